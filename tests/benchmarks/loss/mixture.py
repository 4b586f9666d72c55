"""What formats cost a mixture of experts: the small one of tests/assets, on a novel unseen by it.

The shipped recipes that pack experts, which here take groups of 64 columns since experts have no
more; the choice of tokens that experts are calibrated on; a quarter of the experts dropped.
Calibrated and measured as `quality` is.
"""

from __future__ import annotations

from typing import Any

import yaml

from compress_methods.recipe.matching import config_path
from tests.benchmarks.loss import quality
from tests.benchmarks.readme import RESULTS

MODEL = quality.MODEL.parent / "mixture"
RECIPES = (
    *("int8", "fp8", "int4-rtn", "int4-gptq", "nf4", "mxfp4", "nvfp4"),
    *("lookup3", "int3-gptq", "int2-gptq", "experts25"),
)


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(config_path("recipes", f"{name}.yaml").read_text())
    return found


def changed() -> list[quality.Case]:
    """int3-gptq calibrated on all tokens at every expert, int4-gptq of the experts left, and what
    goes averaged into what stays."""
    three, four, fewer = shipped("int3-gptq"), shipped("int4-gptq"), shipped("experts25")
    everywhere = {**three, "calibration": {**three["calibration"], "experts": "all"}}
    packed = {key: four[key] for key in ("formats", "modules")}
    both = {"stages": [*fewer["stages"], packed], "calibration": four["calibration"]}
    return [
        ("int3-gptq, every token at every expert", everywhere),
        ("experts25, then int4-gptq", both),
        ("experts25, merged", {**fewer, "stages": [{**fewer["stages"][0], "merge": True}]}),
    ]


def run() -> dict[str, Any]:
    cases = [*((name, name) for name in RECIPES), *changed()]
    return quality.measure_all(cases, RESULTS / "mixture.json", MODEL)


table = quality.table

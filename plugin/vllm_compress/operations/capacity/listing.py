"""Every parameter of a model class, as transformers builds it on the meta device.

    python -m vllm_compress.operations.capacity.listing config.json > configs/models/NAME.json

`config.json` may be cut to what decides shapes. Written once for each model whose shape comes with
the package, because importing transformers takes longer than a whole plan; a test writes them again
and compares. Only a model class that `architectures` names and transformers has can be listed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def list_parameters(config: Mapping[str, Any]) -> list[list[Any]]:
    """[name with `*` for the layer, shape, `first:end:step` of the layers or null], in order."""
    import torch
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(settings)
    model.tie_weights()
    found: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name if number is None else name.replace(number.group(), "*", 1)
        found[template, tuple(parameter.shape)].append(-1 if number is None else int(number[0]))
    return [[name, list(shape), _span(layers)] for (name, shape), layers in found.items()]


def _span(layers: list[int]) -> str | None:
    if layers == [-1]:
        return None
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if layers != list(range(layers[0], layers[-1] + 1, step)):
        raise ValueError(f"layers {layers} are not evenly spaced")
    return f"{layers[0]}:{layers[-1] + 1}:{step}"


def write(config: Mapping[str, Any], source: str) -> str:
    """The text of a file of `configs/models`."""
    rows = ",\n".join("  " + json.dumps(row) for row in list_parameters(config))
    head = json.dumps({"source": source, "config": config}, indent=1)
    return f'{head[:-2]},\n "tensors": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    cut = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(write(cut, sys.argv[2] if len(sys.argv) > 2 else sys.argv[1]))

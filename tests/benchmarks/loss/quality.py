"""What each recipe costs in quality: novels-8m, on a novel it has not seen.

All shipped recipes, and in brackets some on a model with outliers. All are calibrated on the same
text, sampled from the model itself. When stopped, it goes on where it was.
Needs the validation text (folder `shared` beside the repository, or COMPRESS_SHARED).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.loss import outliers
from tests.benchmarks.readme import RESULTS
from tests.benchmarks.speed import sparse_cases

REPOSITORY = Path(__file__).resolve().parents[3]
MODEL = REPOSITORY / "tests" / "assets" / "novels-8m"
RECIPES = (
    *("int8", "int8-dynamic", "int8-smooth", "int8-rotation"),
    *("int4-rtn", "int4-awq", "int4-gptq", "int4-smooth", "int4-rotated"),
    *("int3-gptq", "int2-gptq"),
    *("lookup3", "nf4", "trellis2", "int2-lowrank", "fp8", "mxfp4", "nvfp4"),
    *("sparse25-int8", "sparse68", "sparse50-int8", "sparse50-int4-joint", "sparse24"),
    *("auto-3.5", "depth25", "width25-int4"),
    *("sharing25", "tensor-train-embedding"),
    *("depth25-healed", "sharing25-healed", "int2-healed", "int2-scales"),
)
OUTLIERS = {
    f"(with outliers, {name})": name
    for name in (
        *("int8-dynamic", "int8-smooth", "int8-rotation"),
        *("int4-gptq", "int4-smooth", "int4-rotated"),
    )
}
TOKENS = 20_000
Case = tuple[str, Any]
"""A row's name and its recipe; None for two passes over one model, see `sparse_cases`."""
PARTS = ("algorithms", "conversion", "formats", "training", "transforms")
SOURCES = (
    *(f"quant_methods/compress_methods/{part}/**/*.py" for part in PARTS),
    "configs/recipes/*.yaml",
    "tests/benchmarks/loss/*.py",
    "tests/benchmarks/speed/sparse_cases.py",
)


def validation_text() -> Path:
    """The text, or an exit that says where it should be."""
    shared = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "novels-validation.txt"
    if not path.is_file():
        sys.exit("quality needs data/novels-validation.txt in the folder COMPRESS_SHARED names")
    return path


def unfinished(original: Path) -> Path:
    """Where rows of a model are kept until all are there; another file as soon as code behind them
    differs."""
    digest = hashlib.sha256(original.name.encode())
    for path in sorted(path for pattern in SOURCES for path in REPOSITORY.glob(pattern)):
        digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"vllm-compress-quality-{digest.hexdigest()[:16]}.jsonl"


def one_thread() -> None:
    """In every worker: results do not depend on how many there are, text is sampled once."""
    import torch

    from compress_methods.calibration.self_generated import sample_from_model
    from compress_methods.conversion import job as pipeline

    torch.set_num_threads(1)
    sparse_cases.with_unstructured()
    sampled: dict[Any, Any] = {}

    def sample_once(source: Any, tokenizer: Any, settings: Any, *rest: Any) -> Any:
        if settings not in sampled:
            sampled[settings] = sample_from_model(source, tokenizer, settings)
        return sampled[settings]

    pipeline.sample_from_model = sample_once


def measure(original: Path, case: Case) -> dict[str, Any]:
    """One row."""
    from compress_methods import convert
    from compress_methods.evaluation.offline import evaluate

    name, recipe = case
    with tempfile.TemporaryDirectory() as folder:
        model, out = original, Path(folder) / "out"
        if recipe is None:
            model, recipe = sparse_cases.two_passes(original, Path(folder))
        if name in OUTLIERS:
            model = outliers.inject(original, Path(folder) / "outliers")
        report = convert(model, recipe, out, quiet=True)
        measured = evaluate(out, original, validation_text(), limit_tokens=TOKENS)
    row = {
        "recipe": name,
        "bytes": report["bytes_after"],
        "bytes_before": report["bytes_before"],
        "matrix_bits_per_weight": report["compressed_bits_per_weight"] or 16.0,
        **measured.to_dict(),
    }
    with unfinished(original).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, file=sys.stderr, flush=True)
    return row


def measure_all(cases: Sequence[Case], results: Path, original: Path = MODEL) -> dict[str, Any]:
    """All rows, several at a time; stopped, it goes on with those not kept yet.

    With COMPRESS_MISSING set, rows of the results that are there stay as they are.
    """
    validation_text()
    kept = unfinished(original)
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = {row["recipe"]: row for row in map(json.loads, lines)}
    if os.environ.get("COMPRESS_MISSING") and results.exists():
        rows = {row["recipe"]: row for row in json.loads(results.read_text())["rows"]} | rows
    missing = [case for case in cases if case[0] not in rows]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, one_thread) as pool:
        rows |= {row["recipe"]: row for row in pool.map(partial(measure, original), missing)}
    return {"model": original.name, "rows": [rows[name] for name, _ in cases]}


def run() -> dict[str, Any]:
    cases = [*((name, name) for name in RECIPES), *OUTLIERS.items()]
    return measure_all(cases, RESULTS / "quality.json")


def table(results: dict[str, Any]) -> str:
    lines = ["| recipe | bits | bytes | perplexity | KL, nats/token | same top token |"]
    lines.append("|---|---|---|---|---|---|")
    first = results["rows"][0]
    lines.append(
        f"| original | 16 | {first['bytes_before'] / 1e6:.2f} MB | {first['base_perplexity']:.2f} "
        "| 0 | 100% |"
    )
    for row in results["rows"]:
        lines.append(
            f"| {row['recipe']} | {row['matrix_bits_per_weight']:.2f} "
            f"| {row['bytes'] / 1e6:.2f} MB | {row['perplexity']:.2f} "
            f"| {row['kl']:.5f} | {row['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)

"""What each recipe costs in quality: novels-8m, on a novel it has not seen.

All shipped recipes, and below them in brackets algorithms side by side, so that what each part wins
is visible. All are calibrated on the same text, sampled from the model itself. It takes up to
an hour and, when stopped, goes on where it was.
Needs the validation text (folder `shared` beside the repository, or COMPRESS_SHARED).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.loss import outliers
from tests.benchmarks.speed import sparse_cases

REPOSITORY = Path(__file__).resolve().parents[3]
MODEL = REPOSITORY / "tests" / "assets" / "novels-8m"
RECIPES = (
    *("int8", "int8-dynamic", "int8-smooth", "int8-rotation"),
    *("int4-rtn", "int4-awq", "int4-gptq", "int4-rotated", "int3-gptq", "int2-gptq"),
    "int2-lowrank",
    *("sparse50-int8", "sparse50-int4-joint", "sparse24", "auto-3.5"),
)
TWO_PASSES = "(50% sparse, 4 bits, sparsegpt, then gptq)"
PLAIN_BITS = (4, 3, 2)
OUTLIERS = {
    f"(with outliers, {name})": name
    for name in ("int8-dynamic", "int8-smooth", "int8-rotation", "int4-gptq")
}
TOKENS = 20_000
PARTS = ("algorithms", "conversion", "formats", "transforms")
SOURCES = (
    *(f"quant_methods/compress_methods/{part}/**/*.py" for part in PARTS),
    "configs/recipes/*.yaml",
    "tests/benchmarks/loss/quality.py",
    "tests/benchmarks/loss/outliers.py",
    "tests/benchmarks/speed/sparse_cases.py",
)


def validation_text() -> Path:
    """The text, or an exit that says where it should be."""
    shared = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "novels-validation.txt"
    if not path.is_file():
        sys.exit("quality needs data/novels-validation.txt in the folder COMPRESS_SHARED names")
    return path


def plain_name(bits: int, algorithm: str) -> str:
    return f"({bits} bits, {algorithm}, no clipping)"


def plain(bits: int, algorithm: str) -> dict[str, Any]:
    """Group 128, symmetric, no clipping search: the algorithms side by side."""
    return {
        "formats": {"w": {"format": "integer", "bits": bits, "group_size": 128}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
    }


def pruned() -> list[tuple[str, Any]]:
    """Layers and widths dropped: shipped recipes, and width alone with what refitting wins."""

    def width(share: float, **more: Any) -> dict[str, Any]:
        stage = {"transform": "width", "ffn": share, "multiple": 64, **more}
        return {"stages": [stage]}

    heads = {"attention": 0.5, "tensor_parallel": 2}
    return [
        ("depth25", "depth25"),
        ("width25-int4", "width25-int4"),
        ("(1 of 8 layers dropped)", {"stages": [{"transform": "depth", "drop": 1}]}),
        ("(25% of the channels dropped)", width(0.25)),
        ("(50% of the channels dropped)", width(0.5)),
        ("(50% of the channels dropped, not refitted)", width(0.5, compensate=False)),
        ("(50% of the channels and heads dropped)", width(0.5, **heads)),
    ]


def unfinished() -> Path:
    """Where rows are kept until all are there; another file as soon as code behind them differs."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in REPOSITORY.glob(pattern)):
        digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"vllm-compress-quality-{digest.hexdigest()[:16]}.jsonl"


def cases() -> dict[str, Any]:
    """Recipes by row; those of `TWO_PASSES` and `OUTLIERS` are for models of their own."""
    found: dict[str, Any] = {name: name for name in RECIPES}
    for bits in PLAIN_BITS:
        found |= {plain_name(bits, name): plain(bits, name) for name in ("gptq", "rtn")}
    found |= {**OUTLIERS, **dict(sparse_cases.cases()), **dict(pruned())}
    return {**found, TWO_PASSES: None}


def one_thread() -> None:
    """In every worker: results do not depend on how many there are, text is sampled once."""
    import torch

    from compress_methods.calibration.self_generated import sample_from_model
    from compress_methods.conversion import job as pipeline

    torch.set_num_threads(1)
    sampled: dict[Any, Any] = {}

    def sample_once(source: Any, tokenizer: Any, settings: Any, *rest: Any) -> Any:
        if settings not in sampled:
            sampled[settings] = sample_from_model(source, tokenizer, settings)
        return sampled[settings]

    pipeline.sample_from_model = sample_once


def measure(name: str) -> dict[str, Any]:
    """One row."""
    from compress_methods import convert
    from compress_methods.evaluation.offline import evaluate

    recipe = cases()[name]
    with tempfile.TemporaryDirectory() as folder:
        model, out = MODEL, Path(folder) / "out"
        if name == TWO_PASSES:
            model, recipe = sparse_cases.two_passes(MODEL, Path(folder))
        if name in OUTLIERS:
            model = outliers.inject(MODEL, Path(folder) / "outliers")
        report = convert(model, recipe, out, quiet=True)
        measured = evaluate(out, MODEL, validation_text(), limit_tokens=TOKENS)
    row = {
        "recipe": name,
        "bytes": report["bytes_after"],
        "bytes_before": report["bytes_before"],
        "matrix_bits_per_weight": report["compressed_bits_per_weight"] or 16.0,
        **measured.to_dict(),
    }
    with unfinished().open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, file=sys.stderr, flush=True)
    return row


def run() -> dict[str, Any]:
    """All rows, several at a time; stopped, it goes on with those not kept yet."""
    validation_text()
    kept = unfinished()
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = {row["recipe"]: row for row in map(json.loads, lines)}
    names = list(cases())
    missing = [name for name in names if name not in rows]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, one_thread) as pool:
        rows |= zip(missing, pool.map(measure, missing), strict=True)
    kept.unlink(missing_ok=True)
    return {"model": MODEL.name, "rows": [rows[name] for name in names]}


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
    by_name = {row["recipe"]: row for row in results["rows"]}
    ratios = []
    for bits in PLAIN_BITS:
        gptq, rtn = (by_name[plain_name(bits, name)]["kl"] for name in ("gptq", "rtn"))
        ratios.append(f"{bits} bits {gptq / rtn:.3f}")
    tokens = results["rows"][0]["tokens"]
    return "\n".join(
        [
            *lines,
            "",
            f"KL of GPTQ / KL of RTN, both without clipping: {', '.join(ratios)} ({tokens} tokens)",
        ]
    )

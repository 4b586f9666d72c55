"""Automatic bits against fixed ones: novels-8m, calibrated on one half of a text, measured on the
other.

Formats are integers in groups of 128 by gptq, the same in every row. Fixed halves have 4 bits in
half of the layers and 3 in the others; automatic rows spend a budget on 2, 3, 4 or 8 bits for each
group of matrices that vLLM fuses, by measured sensitivity, one of them on learned tables of 3 and 4
bits too. The last column is KL over that of the best fixed half. Needs the validation text (folder
`shared` beside the repository, or COMPRESS_SHARED).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.loss.quality import MODEL, validation_text

TOKENS = 40_000
LAYERS = range(8)
CALIBRATION = {"samples": 64, "length": 512, "seed": 0, "held_out": 8}
GPTQ = {"algorithm": "gptq", "clip": True}
HALVES = {
    "4 bits in the first half, 3 in the last": LAYERS[:4],
    "4 bits in the last half, 3 in the first": LAYERS[4:],
    "4 bits in even layers, 3 in odd": LAYERS[::2],
    "4 bits in odd layers, 3 in even": LAYERS[1::2],
}
HALF_BITS = 3.625
FORMATS: dict[str, dict[str, Any]] = {
    "w2": {"format": "integer", "bits": 2, "group_size": 128, "levels": "mid"},
    "w3": {"format": "integer", "bits": 3, "group_size": 128},
    "w4": {"format": "integer", "bits": 4, "group_size": 128},
    "w8": {"format": "integer", "bits": 8, "group_size": 128},
    "t3": {"format": "lookup", "bits": 3, "group_size": 128, "table": "learned"},
    "t4": {"format": "lookup", "bits": 4, "group_size": 128, "table": "learned"},
}
INTEGERS = ("w2", "w3", "w4", "w8")
BUDGETS: dict[str, tuple[float, tuple[str, ...]]] = {
    "automatic, 3.5 bits": (3.5, INTEGERS),
    "automatic, as many bytes as the halves": (HALF_BITS, INTEGERS),
    "automatic, as many bytes, tables too": (HALF_BITS, (*INTEGERS, "t3", "t4")),
}


def recipe(modules: list[dict[str, Any]], names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    formats = {name: FORMATS[name] for name in names}
    rules = [{**rule, "algorithm": GPTQ} for rule in modules]
    return {"formats": formats, "modules": rules, "calibration": CALIBRATION, **more}


def uniform(bits: int) -> dict[str, Any]:
    return recipe([{"match": "blocks", "format": f"w{bits}"}], (f"w{bits}",))


def half(layers: range) -> dict[str, Any]:
    numbers = "|".join(map(str, layers))
    first = {"match": rf"re:model\.layers\.({numbers})\..*", "format": "w4"}
    return recipe([first, {"match": "blocks", "format": "w3"}], ("w3", "w4"))


def automatic(bits: float, names: tuple[str, ...]) -> dict[str, Any]:
    rule = {"match": "blocks", "format": list(names)}
    return recipe([rule], names, budget={"bits": bits})


def cases() -> dict[str, Any]:
    """Recipes by row."""
    return {
        **{f"{bits} bits": uniform(bits) for bits in (4, 3)},
        **{name: half(layers) for name, layers in HALVES.items()},
        **{name: automatic(*budget) for name, budget in BUDGETS.items()},
    }


def text_halves(folder: Path) -> tuple[Path, Path]:
    """Two files of the same novels: to calibrate on, and to measure on."""
    text = validation_text().read_text(encoding="utf-8")
    paths = folder / "first.txt", folder / "second.txt"
    for path, part in zip(paths, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def run() -> dict[str, Any]:
    from compress_methods import convert
    from compress_methods.evaluation.offline import evaluate

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        calibration, held_out = text_halves(Path(folder))
        for number, (name, wanted) in enumerate(cases().items()):
            out = Path(folder) / str(number)
            report = convert(MODEL, wanted, out, calibration=calibration, quiet=True)
            measured = evaluate(out, MODEL, held_out, limit_tokens=TOKENS)
            rows.append(
                {
                    "name": name,
                    "bytes": report["bytes_after"],
                    "bits": report["compressed_bits_per_weight"],
                    "seconds": report["run"]["seconds"],
                    "predicted_kl": report.get("budget", {}).get("predicted_kl"),
                    **measured.to_dict(),
                }
            )
            print(rows[-1], flush=True)
    return {"model": MODEL.name, "rows": rows}


def best_half(rows: list[dict[str, Any]]) -> float:
    """KL of the best of the fixed halves."""
    return min(float(row["kl"]) for row in rows if row["name"] in HALVES)


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    best = best_half(rows)
    lines = [
        "| formats | bits | bytes | KL, nats/token | predicted | perplexity | of the best half |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        predicted = row["predicted_kl"]
        lines.append(
            f"| {row['name']} | {row['bits']:.3f} | {row['bytes'] / 1e6:.3f} MB "
            f"| {row['kl']:.5f} | {'' if predicted is None else f'{predicted:.5f}'} "
            f"| {row['perplexity']:.2f} | {row['kl'] / best:.3f} |"
        )
    return "\n".join([*lines, "", f"{rows[0]['tokens']:,} tokens that nothing was calibrated on."])

"""What a conversion did, for machines (`report.json`) and people (the model card `README.md`).

`report.json`, stable keys: `fingerprint`, `base_model`, `recipe` (name, sha256, contents),
`bytes_before`, `bytes_after`, `bits_per_weight` (of all parameters), `compressed_bits_per_weight`
(of compressed matrices), `modules` (per module: format, algorithm, shape, bytes_before,
bytes_after, weight_error = ||W-Q||^2/||W||^2, output_error = ||(W-Q)X||^2/||WX||^2 or null,
zeros = share of stored values that are zero, zero_rows = rows of nothing else), `unfit` (module:
why `pack_zeros` left it dense),
`kept` (bytes of tensors copied as they were), `dropped` (tensor: reason), `calibration`, `held_out`
(perplexity, base_perplexity, kl, top1_agreement, tokens; null where nothing was run), `run`
(seconds, peak_memory_bytes, bytes_per_second, tool_version): what differs between two runs.

A recipe of several stages adds `original_parameters` and `stages`: for each its name, settings,
config `changes` [before, after], `layers` kept, their `influence`, bytes and held-out quality. One
that searched adds `search`: target, chosen level, and the `points` it saw (level, bytes,
perplexity, increase, kl, within).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from compress_methods import __version__
from compress_methods.conversion.checkpoint import Source
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.plan import Plan
from compress_methods.safetensors_io import read_header


def build_report(
    journal: Journal, plan: Plan, source: Source, facts: dict[str, Any]
) -> dict[str, Any]:
    """The report of a conversion whose files are all written."""
    modules = {
        name: module
        for unit in plan.units
        for name, module in journal.finished[unit.name]["modules"].items()
    }
    matrix_weights = sum(math.prod(m["shape"]) for m in modules.values())
    matrix_bytes = sum(m["bytes_after"] for m in modules.values())
    if plan.jobs:
        held = [entry for name, entry in source.entries.items() if name not in plan.dropped]
    else:
        files = [read_header(journal.directory / unit.file) for unit in plan.units]
        held = [entry for entries in files for entry in entries.values()]
    weights = sum(math.prod(entry.shape) for entry in held)
    seconds = facts.get("seconds", 0.0)
    return {
        "fingerprint": journal.fingerprint,
        "base_model": source.name,
        "recipe": {
            "name": plan.recipe.name,
            "sha256": plan.recipe.sha256,
            **plan.recipe.to_dict(),
        },
        "bytes_before": source.nbytes,
        "bytes_after": plan.compressed_bytes,
        "bits_per_weight": 8 * plan.compressed_bytes / weights,
        "compressed_bits_per_weight": 8 * matrix_bytes / matrix_weights if modules else None,
        "parameters": weights,
        "modules": modules,
        "unfit": dict(plan.recipe.unfit),
        "kept": plan.compressed_bytes - matrix_bytes,
        "dropped": plan.dropped,
        "calibration": facts.get("calibration"),
        "held_out": facts.get("held_out"),
        "run": {
            "seconds": seconds,
            "peak_memory_bytes": facts.get("peak_memory_bytes"),
            "bytes_per_second": source.nbytes / seconds if seconds else None,
            "tool_version": __version__,
        },
    }


def model_card(report: dict[str, Any]) -> str:
    """The compressed model's README in Markdown, with the hub's metadata block."""
    before, after = report["bytes_before"], report["bytes_after"]
    original = report.get("original_parameters", report["parameters"])
    lines = [
        "---",
        f"base_model: {report['base_model']}",
        "library_name: vllm-compress",
        "tags: [vllm-compress, compressed]",
        "---",
        "",
        f"# {report['base_model']}, compressed with `{report['recipe']['name']}`",
        "",
        "| | original | compressed |",
        "|---|---|---|",
        f"| weights | {_size(before)} | {_size(after)} ({after / before:.1%}) |",
        f"| parameters | {original:,} | {report['parameters']:,} |",
        f"| bits per weight | {8 * before / original:.2f} | {report['bits_per_weight']:.2f} |",
    ]
    lines += _quality(report)
    lines += ["", "## What was done", "", *_stages(report)]
    if report["modules"]:
        lines += ["| modules | format | algorithm | bytes | error |", "|---|---|---|---|---|"]
        lines += [*_module_rows(report), "", f"Kept as they were: {_size(report['kept'])}."]
    lines += [_calibration(report), ""]
    lines += _serving(report)
    return "\n".join(lines)


def _quality(report: dict[str, Any]) -> list[str]:
    held = report["held_out"]
    if held is None:
        return [
            "",
            "Quality was not measured: the recipe ran no text through the model. "
            "`vllm-compress eval THIS --against ORIGINAL --text FILE` measures it.",
        ]
    return [
        f"| perplexity, held-out text | {held['base_perplexity']:.3f} | {held['perplexity']:.3f} |",
        f"| KL to the original, nats/token | 0 | {held['kl']:.5f} |",
        f"| same likeliest token | 100% | {held['top1_agreement']:.2%} |",
        "",
        f"Measured on {held['tokens']} tokens of the calibration source that no algorithm saw.",
    ]


def _stages(report: dict[str, Any]) -> list[str]:
    """A line for every transform: what it changed, and what was left of the quality after it."""
    lines = []
    for number, stage in enumerate(report.get("stages", ()), 1):
        changes = [
            f"{key} {before} to {after}"
            for key, (before, after) in stage.get("changes", {}).items()
            if not isinstance(after, list)
        ]
        measured = stage["held_out"]
        quality = f", perplexity {measured['perplexity']:.3f}" if measured else ""
        what = f" ({', '.join(changes)})" if changes else ""
        lines.append(f"{number}. {stage['stage']}{what}: {_size(stage['bytes_after'])}{quality}")
    return [*lines, ""] if lines else []


def _module_rows(report: dict[str, Any]) -> list[str]:
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for name, module in report["modules"].items():
        leaf = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        kinds[leaf, module["format"], module["algorithm"]].append(module)
    rows = []
    for (leaf, fmt, algorithm), found in kinds.items():
        errors = [
            m["weight_error"] if m["output_error"] is None else m["output_error"] for m in found
        ]
        size = _size(sum(m["bytes_after"] for m in found))
        rows.append(
            f"| `{leaf}` x {len(found)} | {fmt} | {algorithm} | {size} "
            f"| {sum(errors) / len(errors):.2e} |"
        )
    return rows


def _calibration(report: dict[str, Any]) -> str:
    facts = report["calibration"] or {}
    if "length" not in facts:
        return "No calibration was needed; errors are relative to the weights."
    errors = "; errors are relative to the layers' outputs" if report["modules"] else ""
    return (
        f"Calibrated on {facts['sequences']} sequences of {facts['length']} tokens "
        f"({facts['source']}){errors}."
    )


def _serving(report: dict[str, Any]) -> list[str]:
    run = report["run"]
    install, note = ["pip install vllm-compress"], "The plugin is found by vLLM on its own; "
    if not report["modules"]:
        install, note = [], "A plain model: transformers and any vLLM load it, without a plugin; "
    lines = [
        "## Serve it",
        "",
        "```",
        *install,
        "vllm serve PATH_OF_THIS_DIRECTORY",
        "```",
        "",
        f"{note}no flag is needed. `vllm-compress serve` adds a deployment label to the metrics.",
        "",
    ]
    if run["peak_memory_bytes"]:
        lines.append(
            f"Made by vllm-compress {run['tool_version']} in {run['seconds']:.0f} s, "
            f"peak memory {_size(run['peak_memory_bytes'])}. Recipe and every module: report.json."
        )
    return [*lines, ""]


def _size(count: int) -> str:
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"

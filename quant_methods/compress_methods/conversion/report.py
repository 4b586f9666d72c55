"""What a conversion did, for machines (`report.json`) and people (the model card `README.md`).

`report.json`, stable keys: `fingerprint`, `base_model`, `recipe` (name, sha256, contents),
`bytes_before`, `bytes_after`, `bits_per_weight` (of all parameters), `compressed_bits_per_weight`
(of compressed matrices), `modules` (per module: format, algorithm, shape, bytes_before,
bytes_after, weight_error = ||W-Q||^2/||W||^2, output_error = ||(W-Q)X||^2/||WX||^2 or null,
zeros = share of stored values that are zero, zero_rows = rows of nothing else), `unfit` (module:
why it was left dense though the recipe named it), `regrouped` (module: why its groups are smaller
than the recipe says), `refined` (where blocks were trained: for each its `iterations`, the `best`
of them, and `loss` = [[iteration, settled, loss], ...]: the share of codes that was whole by then,
and ||found - original||^2 / ||original||^2 of the output), `notes` (module: what a transform had to
leave, and why), `kept` (bytes of tensors copied as they were), `dense` (name with `*` for numbers:
how many matrices were copied so, bytes), `dropped` (tensor: reason), `calibration`, `held_out` (an
`Evaluation` of `evaluation/metrics.py`; null where nothing was run), `held_out_halves` (the same of
the two halves of the text, where one chose and the other reports), `run` (seconds,
peak_memory_bytes, device, peak_device_bytes or null, bytes_per_second, tool_version): what differs
between two runs; `files` (SHA-256 of every other file), `sha256` (of the report's own values
without that key).

A recipe with a budget adds `budget`: allowed_bytes of the matrices it decided on, predicted_kl.
A recipe of several stages adds `original_parameters` and `stages`: for each its name, settings,
config `changes` [before, after], `layers` kept, their `influence`, bytes and held-out quality. One
that searched adds `search`: target, chosen level, and the `points` it saw (level, bytes,
perplexity, increase, kl, within). One that had to pass a gate adds `gate`: the recipe that was
asked for, its `accept`, and of all `tries` what was measured (`bounds`, `held_out`, `tasks`), which
`layers` have the largest errors and whether it was `accepted`; the rest speaks of the last of them.
One that was trained adds `training`: of each training its settings, the step that was kept
(`best`), `loss_curve` and `held_out_curve` ([step, value], the latter KL on text that decided when
to stop, or the loss there where that is of tokens), a `note` where it diverged, and quality on
other text `before` and after it; errors of modules are those before it. `segments`: of how many
conversions and trainings it was made.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from compress_methods import __version__
from compress_methods.checkpoint.safetensors import Entry, read_header
from compress_methods.checkpoint.source import Source
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.planning.fit import patterns
from compress_methods.conversion.planning.plan import Plan
from compress_methods.system.words import duration, size_text

QUALITY = (
    ("perplexity, change", "", "perplexity_increase", "+.2%"),
    ("KL to the original, nats/token", "0", "kl", ".5f"),
    ("same likeliest token", "100%", "top1_agreement", ".2%"),
    ("accepted as a draft (1 - total variation)", "100%", "acceptance", ".2%"),
    ("margin of decisions, median", "1", "margin_ratio", ".3f"),
    ("cosine to the original's embeddings", "1", "cosine", ".5f"),
    ("the same, of 95% of the texts at least", "1", "cosine_p05", ".5f"),
)
"""Rows of the model card: what it is, the original's, its key and style."""


def _told(journal: Journal, plan: Plan, key: str) -> dict[str, Any]:
    """What the journal's shards say under a key, all together, in order."""
    lines = (journal.finished[shard.name].get(key, {}) for shard in plan.shards)
    return {name: said for line in lines for name, said in line.items()}


def build_report(
    journal: Journal, plan: Plan, source: Source, facts: dict[str, Any]
) -> dict[str, Any]:
    """The report of a conversion whose files are all written."""
    modules, refined = _told(journal, plan, "modules"), _told(journal, plan, "refined")
    matrix_weights = sum(math.prod(m["shape"]) for m in modules.values())
    matrix_bytes = sum(m["bytes_after"] for m in modules.values())
    if plan.jobs:
        held = [entry for name, entry in source.entries.items() if name not in plan.dropped]
    else:
        files = [read_header(journal.directory / shard.file) for shard in plan.shards]
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
        **({"refined": refined} if refined else {}),
        "unfit": dict(plan.recipe.unfit),
        "regrouped": {job.slot.module: job.regrouped for job in plan.jobs if job.regrouped},
        "notes": _told(journal, plan, "notes"),
        "kept": plan.compressed_bytes - matrix_bytes,
        "dense": _dense(plan, source),
        "dropped": plan.dropped,
        "calibration": facts.get("calibration"),
        "held_out": facts.get("held_out"),
        "held_out_halves": facts.get("held_out_halves", []),
        "run": {
            "seconds": seconds,
            "peak_memory_bytes": facts.get("peak_memory_bytes"),
            "device": facts.get("device"),
            "peak_device_bytes": facts.get("peak_device_bytes"),
            "bytes_per_second": source.nbytes / seconds if seconds else None,
            "tool_version": __version__,
        },
        **{key: told[key] for told in facts.get("passes", ()) for key in told if key == "budget"},
    }


def index_text(headers: Mapping[str, Mapping[str, Entry]]) -> str:
    """The index of a sharded checkpoint, from the tensors of each of its files."""
    weight_map = {name: file for file, entries in headers.items() for name in entries}
    total = sum(entry.nbytes for entries in headers.values() for entry in entries.values())
    block = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(block, indent=2, sort_keys=True) + "\n"


def _loading(report: dict[str, Any]) -> list[str]:
    """What transformers makes of the directory, first of all."""
    if not report["modules"]:
        return []
    return [
        "**In transformers, `import compress_methods` before `from_pretrained`**: the weights are "
        "then unpacked. Without that import transformers warns of an unknown quantization type and "
        "starts from random weights.",
        "",
    ]


def _dense(plan: Plan, source: Source) -> dict[str, dict[str, int]]:
    """The matrices among the tensors that are copied, experts in one tensor among them."""
    if not plan.jobs:
        return {}
    sizes = {
        name.removesuffix(".weight"): source.entries[name].nbytes
        for shard in plan.shards
        for name in shard.copies
        if len(source.entries[name].shape) > 1
    }
    return {
        name: {"matrices": count, "bytes": size} for name, (count, size) in patterns(sizes).items()
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
        *_loading(report),
        "| | original | compressed |",
        "|---|---|---|",
        f"| weights | {size_text(before)} | {size_text(after)} ({after / before:.1%}) |",
        f"| parameters | {original:,} | {report['parameters']:,} |",
        f"| bits per weight | {8 * before / original:.2f} | {report['bits_per_weight']:.2f} |",
    ]
    lines += _quality(report)
    lines += ["", "## What was done", "", *_stages(report)]
    if report["modules"]:
        lines += ["| modules | format | algorithm | bytes | error |", "|---|---|---|---|---|"]
        lines += [*_module_rows(report), "", *_budget(report), _kept(report)]
    if "refined" in report:
        lines.append(f"Refined block by block: {refined_text(report['refined'])}.")
    lines += [_calibration(report), *_training(report), ""]
    lines += _gate(report)
    lines += _serving(report)
    return "\n".join(lines)


def refined_text(refined: Mapping[str, Any]) -> str:
    """How many blocks, and their mean error before and after."""
    before = sum(facts["loss"][0][2] for facts in refined.values()) / len(refined)
    best = (min(loss for _, settled, loss in f["loss"] if settled == 1) for f in refined.values())
    after = sum(best) / len(refined)
    return f"{len(refined)} blocks, error of their outputs {before:.2e} before, {after:.2e} after"


def _budget(report: dict[str, Any]) -> list[str]:
    """How formats were chosen, where a budget decided."""
    if "budget" not in report:
        return []
    kl = report["budget"]["predicted_kl"]
    return [
        "Formats were chosen layer by layer, by what each costs the predictions on calibration "
        f"text; the sum of what was measured is {kl:.5f} nats/token of KL.",
        "",
    ]


def _kept(report: dict[str, Any]) -> str:
    """What was copied: bytes, and which matrices."""
    named = [
        f"`{name}`" + (f" x {found['matrices']}" if found["matrices"] > 1 else "")
        for name, found in report.get("dense", {}).items()
    ]
    what = f", among it {', '.join(named)}" if named else ""
    return f"Kept as they were: {size_text(report['kept'])}{what}."


def _quality(report: dict[str, Any]) -> list[str]:
    held = report["held_out"]
    if held is None:
        return [
            "",
            "Quality was not measured: the recipe ran no text through the model. "
            "`vllm-compress eval THIS --against ORIGINAL --text FILE` measures it.",
        ]
    rows = []
    if "perplexity" in held:
        before, after = (_number(held[key], ".3f") for key in ("base_perplexity", "perplexity"))
        rows.append(f"| perplexity, held-out text | {before} | {after} |")
    for text, original, name, style in QUALITY:
        value = held.get(name)
        if value is not None or (name == "kl" and name in held):
            found = _number(value, style) + _interval(held, name, style)
            rows.append(f"| {text} | {original} | {found} |")
    return [
        *rows,
        "",
        f"Measured on {_observations(held)} of the calibration source that no algorithm saw"
        + (
            ", nor the search that chose how far to prune"
            if "chosen_on" in report.get("search", {})
            else ""
        )
        + (
            f"; in brackets 95% intervals by its {n} sequences."
            if (n := held.get("sequences"))
            else "."
        ),
    ]


def _observations(held: Mapping[str, Any]) -> str:
    """What a measurement counts."""
    names = (("tokens", "tokens"), ("decisions", "decisions"), ("sequences", "texts"))
    return next(f"{held[key]} {name}" for key, name in names if key in held)


def _number(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)


def _interval(held: Mapping[str, Any], name: str, style: str) -> str:
    """Both ends of a 95% interval, if there is one."""
    ends = (held.get("intervals") or {}).get(name, (None, None))
    return f" ({ends[0]:{style}} to {ends[1]:{style}})" if None not in ends else ""


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
        perplexity = (measured or {}).get("perplexity")
        quality = "" if perplexity is None else f", perplexity {perplexity:.3f}"
        what = f" ({', '.join(changes)})" if changes else ""
        lines.append(
            f"{number}. {stage['stage']}{what}: {size_text(stage['bytes_after'])}{quality}"
        )
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
        size = size_text(sum(m["bytes_after"] for m in found))
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
    rendered = sum(file["rendered"] for file in facts.get("files", ()))
    chats = f" {rendered:,} chats went through the chat template." if rendered else ""
    return (
        f"Calibrated on {facts['sequences']} sequences of {facts['length']} tokens "
        f"({facts['source']}){errors}.{chats}"
    )


def _training(report: dict[str, Any]) -> list[str]:
    """A line for each training: what it won back."""
    lines = []
    for facts in report.get("training", ()):
        before, after = (_number(facts[key]["kl"], ".4f") for key in ("before", "held_out"))
        note = f" It {facts['note']}." if facts["note"] else ""
        lines.append(
            f"Trained (`{facts['train']}`) towards {facts['teacher']} on {facts['sequences']} "
            f"sequences of {facts['length']} tokens ({facts['text']}), {facts['best']} of "
            f"{facts['steps']} steps kept: KL on held-out text {before} before, {after} after."
            f"{note}"
        )
    return lines


def _gate(report: dict[str, Any]) -> list[str]:
    """Which recipes were tried, and what each of them measured."""
    if "gate" not in report:
        return []
    lines = [
        "## What it had to pass",
        "",
        "The first recipe was kept whose loss is within every bound, with 95% confidence.",
        "",
        "| recipe | weights | accepted | measured |",
        "|---|---|---|---|",
    ]
    for tried in report["gate"]["tries"]:
        accepted = "yes" if tried["accepted"] else "no"
        size = size_text(tried["bytes"])
        lines.append(f"| `{tried['recipe']}` | {size} | {accepted} | {tried['said']} |")
    return [*lines, ""]


def _serving(report: dict[str, Any]) -> list[str]:
    run = report["run"]
    install, note = ["pip install WHEEL_OF_VLLM_COMPRESS"], "The plugin is found by vLLM itself; "
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
            f"Made by vllm-compress {run['tool_version']} in {duration(run['seconds'])}, "
            f"peak memory {size_text(run['peak_memory_bytes'])}. "
            "Recipe and every module: report.json."
        )
    return [*lines, ""]

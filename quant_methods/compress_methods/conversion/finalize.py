"""The end of a conversion: index, config, tokenizer, report and model card, then everything is
read again and every tensor of the original accounted for. Only then the `.incomplete` mark goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods import __version__
from compress_methods.checkpoint.companions import copy_companions
from compress_methods.checkpoint.compressed import INDEX, open_compressed, read_entries
from compress_methods.checkpoint.integrity import seal
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.safetensors import read_header
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.conversion.history import History
from compress_methods.conversion.journal import REPORT, Journal, sha256
from compress_methods.conversion.planning.plan import Plan
from compress_methods.conversion.report import build_report, index_text, model_card
from compress_methods.errors import CheckpointError
from compress_methods.system.files import write_text
from compress_methods.system.progress import Progress


@dataclass(frozen=True)
class StageSummary:
    """What the report of one of several stages says besides: those before it, and the stage."""

    history: History
    stage: dict[str, Any]


def finalize(
    journal: Journal,
    plan: Plan,
    source: Source,
    facts: dict[str, Any],
    *,
    config: Mapping[str, Any],
    summary: StageSummary | None = None,
    quiet: bool,
) -> dict[str, Any]:
    """Complete and verify an output directory whose shards are all there; returns the report.

    `config` becomes config.json, with what was compressed, if anything was.
    """
    out = journal.directory
    copy_companions(source.directory, out)
    headers = {shard.file: read_header(out / shard.file) for shard in plan.shards}
    write_text(out / INDEX, index_text(headers))
    if plan.jobs:
        spec = plan.compression_spec(source.name, __version__)
        config = {**config, "quantization_config": plan.layout.config(spec)}
    _write_json(out / "config.json", config)
    verify(journal, plan, source, quiet=quiet)
    report = build_report(journal, plan, source, facts)
    if summary is not None:
        measured = {key: report[key] for key in ("bytes_before", "bytes_after", "held_out")}
        stage = {**summary.stage, **measured}
        report |= summary.history.after(plan.dropped, plan.renamed, stage).report()
    write_text(out / "README.md", model_card(report))
    known = {shard.file: journal.finished[shard.name]["sha256"] for shard in plan.shards}
    report = seal(report, out, known)
    _write_json(out / REPORT, report)
    journal.finish()
    return report


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def verify(journal: Journal, plan: Plan, source: Source, *, quiet: bool) -> None:
    """Re-read every file against the journal's checksums and account for every original tensor."""
    out = journal.directory
    total = sum((out / shard.file).stat().st_size for shard in plan.shards)
    with Progress(total, "verifying", quiet=quiet) as progress:
        for shard in plan.shards:
            path = out / shard.file
            if sha256(path) != journal.finished[shard.name]["sha256"]:
                raise CheckpointError(f"{path}: does not read back as it was written; bad disk?")
            progress.step(path.stat().st_size, shard.file)
    stored, wrong = _stored(out, plan)
    accounted = set(plan.dropped)
    accounted |= {source.tensor_of(job.slot) for job in plan.jobs}
    missing = [
        name
        for name in source.entries
        if name not in accounted and plan.renamed.get(name, name) not in stored
    ]
    if missing or wrong:
        raise CheckpointError(f"{out}: {(missing + wrong)[0]} is in the original, but not here")


def _stored(out: Path, plan: Plan) -> tuple[set[str], list[str]]:
    """Tensors of a result that are kept, and packed modules that cannot be read back."""
    if not plan.jobs:
        # Names and shapes against the model that transformers builds from the result's config.
        return set(open_source(out, open_skeleton(out), out.name, False).entries), []
    if plan.layout is OWN:
        checkpoint = open_compressed(out, allow_incomplete=True)
        wrong = [j.slot.module for j in plan.jobs if j.slot.module not in checkpoint.matrices]
        return set(checkpoint.dense), wrong
    entries = read_entries(out)
    packed = {name for job in plan.jobs for name in job.specs(plan.layout)}
    return entries.keys() - packed, sorted(packed - entries.keys())

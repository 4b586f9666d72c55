"""The end of a conversion: index, config, tokenizer, report and model card, then everything is
read again and every tensor of the original accounted for. Only then the `.incomplete` mark goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods import __version__
from compress_methods.compressed import INDEX, open_compressed
from compress_methods.conversion.checkpoint import Source, companion_files, open_source
from compress_methods.conversion.history import History
from compress_methods.conversion.journal import REPORT, Journal, sha256
from compress_methods.conversion.plan import Plan
from compress_methods.conversion.report import build_report, model_card
from compress_methods.errors import CheckpointError
from compress_methods.files import write_text
from compress_methods.progress import Progress
from compress_methods.safetensors_io import read_header
from compress_methods.skeleton import build_skeleton


@dataclass(frozen=True)
class Told:
    """What the report of a chain's stage says besides: the stages before it, and the stage."""

    history: History
    stage: dict[str, Any]


def finish(
    journal: Journal,
    plan: Plan,
    source: Source,
    facts: dict[str, Any],
    *,
    config: Mapping[str, Any],
    told: Told | None = None,
    quiet: bool,
) -> dict[str, Any]:
    """Complete and verify an output directory whose units are all there; returns the report.

    `config` becomes config.json, with what was compressed, if anything was.
    """
    out = journal.directory
    for path in companion_files(source.directory):
        temporary = out / f"{path.name}.tmp"
        shutil.copyfile(path, temporary)
        temporary.replace(out / path.name)
    _write_json(out / INDEX, _index(journal, plan))
    if plan.jobs:
        spec = plan.compression_spec(source.name, __version__)
        config = {**config, "quantization_config": spec.to_dict()}
    _write_json(out / "config.json", config)
    verify(journal, plan, source, quiet=quiet)
    report = build_report(journal, plan, source, facts)
    if told is not None:
        measured = {key: report[key] for key in ("bytes_before", "bytes_after", "held_out")}
        stage = {**told.stage, **measured}
        report |= told.history.after(plan.dropped, plan.renamed, stage).report()
    _write_json(out / REPORT, report)
    write_text(out / "README.md", model_card(report))
    journal.finish()
    return report


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=path.name == INDEX) + "\n")


def _index(journal: Journal, plan: Plan) -> dict[str, Any]:
    weight_map = {}
    total = 0
    for unit in plan.units:
        for name, entry in read_header(journal.directory / unit.file).items():
            weight_map[name] = unit.file
            total += entry.nbytes
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def verify(journal: Journal, plan: Plan, source: Source, *, quiet: bool) -> None:
    """Re-read every file against the journal's checksums and account for every original tensor."""
    out = journal.directory
    total = sum((out / unit.file).stat().st_size for unit in plan.units)
    with Progress(total, "verifying", quiet=quiet) as progress:
        for unit in plan.units:
            path = out / unit.file
            if sha256(path) != journal.finished[unit.name]["sha256"]:
                raise CheckpointError(f"{path}: does not read back as it was written; bad disk?")
            progress.step(path.stat().st_size, unit.file)
    if plan.jobs:
        checkpoint = open_compressed(out, allow_incomplete=True)
        stored = set(checkpoint.dense)
        wrong = [j.target.module for j in plan.jobs if j.target.module not in checkpoint.matrices]
    else:
        # Names and shapes against the model that transformers builds from the result's config.
        stored, wrong = set(open_source(out, build_skeleton(out), out.name, False).entries), []
    accounted = set(plan.dropped)
    accounted |= {source.names[f"{job.target.module}.weight"] for job in plan.jobs}
    missing = [
        name
        for name in source.entries
        if name not in accounted and plan.renamed.get(name, name) not in stored
    ]
    if missing or wrong:
        raise CheckpointError(f"{out}: {(missing + wrong)[0]} is in the original, but not here")

"""Results, whole or in the making, whose files are not as they were written: what can be made again
from what, so that the same command ends with the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.companions import companion_files, companion_name
from compress_methods.checkpoint.compressed import INDEX
from compress_methods.checkpoint.integrity import (
    FILES,
    find_damaged,
    read_report,
    sha256,
)
from compress_methods.checkpoint.safetensors import read_header
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.planning.plan import Shard
from compress_methods.conversion.report import index_text, model_card
from compress_methods.errors import CheckpointError
from compress_methods.system.files import copy_file, write_text
from compress_methods.system.progress import Progress

CARD = "README.md"


def forget_damaged(
    journal: Journal, shards: Sequence[Shard], runs_text: bool, quiet: bool = True
) -> None:
    """Have shards whose files are damaged converted again, before a sweep goes on.

    Where text runs through the model, a block needs the activations at its input. They are kept for
    the next block only, so all blocks are converted again if one of them or those are damaged.
    """
    finished = [shard for shard in shards if shard.name in journal.finished]
    lost = [shard.name for shard in finished if not journal.holds(shard.name)]
    blocks = [shard for shard in finished if shard.block is not None and shard.block >= 0]
    moved = {shard.name for shard in finished if shard.block is not None}
    again = set(lost)
    if runs_text and blocks:
        gone = not journal.keeps_states(len(blocks))
        if gone or any(shard.name in lost for shard in blocks):
            again |= moved
    if again:
        journal.forget(again)
        what = f"{len(lost)} finished files" if lost else "the activations"
        _say(f"{journal.directory}: {what} damaged or missing; converting again", quiet)


def verified(
    journal: Journal, source: Path, shards: Sequence[Shard] | None, quiet: bool
) -> dict[str, Any] | None:
    """The report of a finished result, once all its files are as they were written.

    Files that need no weights are made again; None where others are damaged: the journal is then
    open again. `shards` are those that can be converted one by one, or None.
    """
    out = journal.directory
    try:
        report = read_report(out)
    except CheckpointError as problem:
        _say(f"{problem}; converting again", quiet)
        journal.reopen()
        return None
    total = sum(path.stat().st_size for path in map(out.joinpath, report[FILES]) if path.exists())
    with Progress(total, "verifying", quiet=quiet) as progress:
        damaged = find_damaged(
            out, report, lambda path: progress.step(path.stat().st_size, path.name)
        )
    left = [name for name in damaged if not _restored(out, name, report, source)]
    for name in damaged:
        how = "converting again" if name in left else "made again"
        _say(f"{out / name}: damaged or missing; {how}", quiet)
    if not left:
        return report
    journal.reopen(_lines(report, left, shards or ()))
    return None


def _restored(out: Path, name: str, report: Mapping[str, Any], source: Path) -> bool:
    """Whether a damaged file could be made again without converting anything, and was."""
    path = out / name
    originals = {companion_name(found, source): found for found in companion_files(source)}
    if name == CARD:
        write_text(path, model_card(dict(report)))
    elif name == INDEX:
        files = [out / other for other in report[FILES] if other.endswith(".safetensors")]
        try:
            write_text(path, index_text({file.name: read_header(file) for file in files}))
        except CheckpointError:
            return False
    elif name in originals:
        path.parent.mkdir(parents=True, exist_ok=True)
        copy_file(originals[name], path)
    return path.is_file() and sha256(path) == report[FILES][name]


def _lines(
    report: Mapping[str, Any], damaged: Iterable[str], shards: Sequence[Shard]
) -> list[dict[str, Any]]:
    """Journal lines of the shards that are still whole, as the conversion wrote them."""
    files, modules = report[FILES], report["modules"]
    gone = set(damaged)
    return [
        {
            "shard": shard.name,
            "file": shard.file,
            "sha256": files[shard.file],
            "modules": {job.slot.module: modules[job.slot.module] for job in shard.jobs},
        }
        for shard in shards
        if shard.file in files and shard.file not in gone
    ]


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)

"""What searches share: the output directory while they try things in `.work`, and the end, when
the directory that was chosen moves into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.integrity import FILES, find_damaged, read_report, seal
from compress_methods.conversion.journal import REPORT, Journal
from compress_methods.conversion.report import model_card
from compress_methods.errors import CompressError, OutputError, named
from compress_methods.system.files import fsync_directory, write_text
from compress_methods.system.processes import Processes

CARD = "README.md"
Report = dict[str, Any]


@contextmanager
def opened(out: Path, fingerprint: str, processes: Processes | None = None) -> Iterator[Journal]:
    """The journal of a search in `out`, for all `processes` of one. What is finished stays there
    whatever is raised; a user's mistake before anything was finished leaves the place as it was
    found."""
    try:
        journal = Journal(out, fingerprint, processes)
    except OSError as problem:
        raise OutputError(named(problem, out)) from problem
    with closing(journal):
        try:
            yield journal
        except OSError as problem:
            raise OutputError(
                f"{named(problem, out)}; what is finished is kept, "
                "the same command continues from there"
            ) from problem
        except OutputError:
            raise
        except CompressError:
            journal.abandon()
            raise


def publish(
    journal: Journal, name: str, key: str, amend: Callable[[Report, Path], Report]
) -> Report:
    """Move the finished files of `.work/name` into the output directory, the report last; returns
    it. `amend` is given the report and that folder, and adds `key` to it, once."""
    place, out = journal.work / name, journal.directory
    if (place / REPORT).exists():
        report = read_json(place / REPORT)
        if key not in report:
            _rewrite(amend({**report, "fingerprint": journal.fingerprint}, place), place)
        files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path == Path(REPORT)):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).replace(out / path)
        fsync_directory(out)
    damaged = find_damaged(out)
    if damaged:
        journal.forget([name])
        raise OutputError(
            f"{out / damaged[0]}: does not read back as it was written; the same command "
            "makes it again"
        )
    report = read_report(out)
    journal.finish()
    return report


def _rewrite(report: Mapping[str, Any], place: Path) -> None:
    """Card and report anew; of the other files those that are listed are not read again."""
    write_text(place / CARD, model_card(dict(report)))
    known = {name: digest for name, digest in report[FILES].items() if name != CARD}
    write_text(place / REPORT, json.dumps(seal(report, place, known), indent=2) + "\n")

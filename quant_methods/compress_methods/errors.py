"""Errors a user can act on: one line that names the file, key or tensor, what was found, what was
expected. The command line prints them without a traceback and exits with their `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

MOST_NAMES = 3


class CompressError(Exception):
    """Base of every error that is the user's to fix; one line whatever names it quotes."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
        )


class RecipeError(CompressError):
    """A recipe that cannot be carried out."""


class FormatError(CompressError):
    """A format's parameters, or a matrix that a format cannot hold."""


class CheckpointError(CompressError):
    """A checkpoint that is missing something, damaged or not what its config says."""


class CalibrationError(CompressError):
    """Calibration or evaluation text that cannot be used."""


class DeploymentError(CompressError):
    """A deployment file that cannot be carried out."""


class OutputError(CompressError):
    """An output directory that cannot be written."""


class NotAccepted(CompressError):
    """A result that lost more than its recipe's `accept` allows, as did those of its `fallback`.
    `tries` says of each what was measured, as the `gate` of a report does."""

    exit_code = 3

    def __init__(self, message: str, tries: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.tries = list(tries)


def named(problem: OSError, path: object) -> str:
    """The file that the system names, else `path`, and what it says."""
    file = problem.filename2 or problem.filename or path
    return f"{file}: {problem.strerror or problem}"


def nearest(found: str, valid: Iterable[str]) -> str:
    """'did you mean X?' for valid names that begin like it, else the closest one, else all."""
    names = sorted(valid)
    longer = [name for name in names if found and name.startswith(found)]
    if longer:
        return f"did you mean {' or '.join(map(repr, longer[:MOST_NAMES]))}?"
    close = difflib.get_close_matches(found, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"

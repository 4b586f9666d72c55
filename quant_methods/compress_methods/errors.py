"""Errors a user can act on: one line that names the file, key or tensor, what was found, what was
expected. The command line prints them without a traceback and exits 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Base of every error that is the user's to fix."""


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


def nearest(found: str, valid: Iterable[str]) -> str:
    """', did you mean X?' for the closest valid name, else the list of valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(found, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"

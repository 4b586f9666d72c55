"""Bits of a finished result that are not as they were written."""

from __future__ import annotations

import json
import random
from pathlib import Path

from compress_methods.checkpoint.integrity import require_intact
from compress_methods.errors import CheckpointError
from tests.robustness.outcomes import Outcome, Tally
from tests.robustness.result import make, recipe, tiny_model


def try_flips(flips: int, folder: Path, chance: random.Random) -> Tally:
    """One bit each, of every file in turn; the reader of all bytes must name the file."""
    tally = Tally("one flipped bit of a finished result")
    out = folder / "flipped"
    make(tiny_model(folder / "source"), recipe("gptq", folder), out)
    names = sorted(path.name for path in out.iterdir() if path.is_file() and path.stat().st_size)
    require_intact(out)
    for number in range(flips):
        path = out / names[number % len(names)]
        whole = path.read_bytes()
        data, bit = bytearray(whole), chance.randrange(len(whole) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        tally.add(_outcome(out, path, whole, bytes(data)), f"bit {bit} of {path.name}")
        path.write_bytes(whole)
    require_intact(out)
    return tally


def _outcome(out: Path, path: Path, before: bytes, after: bytes) -> Outcome:
    try:
        require_intact(out)
    except CheckpointError as problem:
        return Outcome.CLEAR if str(path) in str(problem) else Outcome.UNCLEAR
    except Exception:
        return Outcome.CRASHED
    # The report may be written in two ways that mean the same: 1e-05 and 1E-05.
    same = path.name == "report.json" and json.loads(before) == json.loads(after)
    return Outcome.VALUE if same else Outcome.SILENT

"""The `calibration:` block of a recipe: how much text, and whose.

    calibration: {samples: auto, length: 512, seed: 0, held_out: 8}
    calibration: {files: [{path: chats.jsonl, weight: 2}, code.txt]}
    calibration: {source: self, preset: code}
    calibration: {experts: all}

`samples: auto`, the same as none, is settled when the model is known: `for_columns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from compress_methods.errors import CalibrationError, CompressError, nearest
from compress_methods.registry import build_dataclass

LEAST_SAMPLES = 64
TOKENS_PER_COLUMN = 8
"""With as many tokens as columns a matrix's Hessian is hardly one."""
AUTO, SELF, PLAIN = "auto", "self", "plain"
ROUTED, ALL = "routed", "all"
PRESETS = (PLAIN, "chat", "code", "long")
KEYS = ("samples", "length", "seed", "held_out", "files", "source", "preset", "experts")


@dataclass(frozen=True)
class TextFile:
    """A file of calibration text, and its weight among those it is mixed with."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise CalibrationError(f"weight is {self.weight}, expected a number above 0")


@dataclass(frozen=True)
class CalibrationSettings:
    """How many sequences, of how many tokens each, and what they are cut from: `files`, or what the
    model writes itself under `preset`; with neither, what the model writes where it is needed.
    `auto`: `samples` is not settled yet. `experts` are calibrated on the tokens `routed` to each,
    or on `all`."""

    samples: int = LEAST_SAMPLES
    length: int = 512
    seed: int = 0
    held_out: int = 8
    files: tuple[TextFile, ...] = ()
    preset: str = ""
    auto: bool = False
    experts: str = ROUTED

    def __post_init__(self) -> None:
        for key, least in (("samples", 1), ("length", 8), ("seed", 0), ("held_out", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CalibrationError(f"{key} is {value!r}, expected an integer from {least}")
        if self.experts not in (ROUTED, ALL):
            raise CalibrationError(f"experts is {self.experts!r}, expected {ROUTED} or {ALL}")
        if self.preset and self.preset not in PRESETS:
            raise CalibrationError(
                f"unknown preset {self.preset!r}; {nearest(self.preset, PRESETS)}"
            )
        if self.preset and self.files:
            raise CalibrationError(
                f"files and preset {self.preset!r} are both given, expected one of them"
            )

    @property
    def rows(self) -> int:
        """Sequences in all, held-out ones included."""
        return self.samples + self.held_out

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return self.samples * self.length

    def describe(self) -> str:
        """In words for people."""
        return f"{self.samples} + {self.held_out} held-out sequences of {self.length} tokens"

    def for_columns(self, columns: int) -> CalibrationSettings:
        """The same with `samples` settled: where it is `auto`, as many as the widest matrix whose
        inputs are gathered has use for."""
        if not self.auto:
            return self
        enough = math.ceil(TOKENS_PER_COLUMN * columns / self.length)
        return replace(self, samples=max(LEAST_SAMPLES, enough), auto=False)

    def beside(self, folder: Path) -> CalibrationSettings:
        """The same with relative paths of files taken from `folder`."""
        return replace(
            self, files=tuple(replace(file, path=folder / file.path) for file in self.files)
        )

    def asked(self, text: str | Path | Sequence[str | Path] | None) -> CalibrationSettings:
        """The same with the text that a command asks for, if it does: files, or `self:PRESET`."""
        sources = [text] if isinstance(text, str | Path) else list(text or ())
        if not sources:
            return self
        own = [str(source) for source in sources if str(source).partition(":")[0] == SELF]
        if own and len(sources) > 1:
            raise CalibrationError(f"calibration {own[0]!r} cannot be mixed with other text")
        if own:
            return replace(self, files=(), preset=own[0].partition(":")[2] or PLAIN)
        return replace(self, files=tuple(TextFile(Path(source)) for source in sources), preset="")

    def to_dict(self) -> dict[str, Any]:
        """What makes the text, as a recipe says it; files by name, wherever they lie."""
        found: dict[str, Any] = {
            "samples": AUTO if self.auto else self.samples,
            "length": self.length,
            "seed": self.seed,
            "held_out": self.held_out,
        }
        if self.files:
            found["files"] = [
                {"path": file.path.name, "weight": float(file.weight)} for file in self.files
            ]
        if self.experts != ROUTED:
            found["experts"] = self.experts
        return {**found, "preset": self.preset} if self.preset else found


def parse_settings(block: Any, where: str, error: type[CompressError]) -> CalibrationSettings:
    """The settings of a `calibration:` block; `error` names the key."""
    if not isinstance(block, Mapping):
        raise error(f"{where}: expected a mapping, found {block!r:.80}")
    for key in block:
        if key not in KEYS:
            raise error(f"{where}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    values = dict(block)
    if isinstance(values.get("samples"), str) and values["samples"] != AUTO:
        raise error(f"{where}: samples is {values['samples']!r}, expected a number or {AUTO}")
    if values.get("samples", AUTO) == AUTO:
        values |= {"auto": True, "samples": LEAST_SAMPLES}
    if "source" in values:
        if values.pop("source") != SELF:
            raise error(
                f"{where}: source is {block['source']!r:.80}, expected {SELF}; "
                "text of your own goes into files"
            )
        values.setdefault("preset", PLAIN)
    if values.get("preset", PLAIN) == "":
        raise error(f"{where}: preset is '', expected {', '.join(PRESETS)}")
    if "files" in values:
        values["files"] = _files(values["files"], f"{where}: files", error)
    return cast(CalibrationSettings, build_dataclass(CalibrationSettings, values, where, error))


def _files(value: Any, where: str, error: type[CompressError]) -> tuple[TextFile, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise error(
            f"{where} is {value!r:.80}, expected a list such as "
            "[chats.jsonl, {path: code.txt, weight: 2}]"
        )
    found = []
    for i, entry in enumerate(value):
        entry = {"path": entry} if isinstance(entry, str | Path) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str | Path):
            raise error(f"{where}[{i}] is {entry!r:.80}, expected a path, or path and weight")
        if entry["path"] in ("", Path()):
            raise error(f"{where}[{i}]: path is empty")
        entry = {**entry, "path": Path(entry["path"])}
        found.append(build_dataclass(TextFile, entry, f"{where}[{i}]", error))
    return tuple(found)

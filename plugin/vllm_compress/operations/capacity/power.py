"""Watts, energy per million tokens and what it emits, under assumptions that are said.

A device draws a share of its rated watts while a step runs and a smaller one between steps; how
often a step runs is simulated. The shares are those of public measurements of vLLM on H100 and
H200: 270 to 680 of 700 W busy, by batch, and 80 idle. `overhead` multiplies what devices draw by
what the rest of the host and its cooling take. All energy is put on generated tokens.

Fails where: the batch decides the draw. One request at a time takes about half of the rated watts,
a full batch of prompts all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from compress_methods.errors import CompressError
from compress_methods.registry import build_dataclass
from compress_methods.system.user_file import read_yaml

JOULES_PER_KWH = 3.6e6
MILLION = 1e6


class PowerError(CompressError):
    """Assumptions of energy that are none."""


@dataclass(frozen=True)
class Power:
    """Shares of rated watts, 0 to 1, while a step runs and between steps; watts at the meter for
    each watt of a device, from 1; grams of CO2 equivalents for a kWh, None where not known."""

    busy: float = 0.75
    idle: float = 0.12
    overhead: float = 1.0
    grams_per_kwh: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.idle <= self.busy <= 1:
            raise PowerError(
                f"idle is {self.idle:g} and busy {self.busy:g}, expected 0 <= idle <= busy <= 1"
            )
        if not 1 <= self.overhead < math.inf:
            raise PowerError(f"overhead is {self.overhead:g}, expected a number from 1")
        if self.grams_per_kwh is not None and not 0 <= self.grams_per_kwh < math.inf:
            raise PowerError(f"grams_per_kwh is {self.grams_per_kwh:g}, expected a number from 0")

    def watts(self, rated: float, devices: int, busy: float) -> float:
        """Mean watts of devices in which a step runs for a share `busy` of the time."""
        return devices * rated * (self.idle + (self.busy - self.idle) * busy) * self.overhead

    def kwh_per_million(self, watts: float, tokens_per_second: float) -> float:
        """Energy of a million generated tokens."""
        return watts / tokens_per_second * MILLION / JOULES_PER_KWH

    def co2_kg_per_million(self, kwh: float) -> float | None:
        """Kilograms of CO2 equivalents of so many kWh; None without a grid."""
        return None if self.grams_per_kwh is None else kwh * self.grams_per_kwh / 1e3

    @property
    def said(self) -> str:
        """The assumptions in one line."""
        text = (
            f"energy: devices draw {100 * self.busy:g}% of their rated watts while a step runs, "
            f"{100 * self.idle:g}% between, x {self.overhead:g} for the host and cooling"
        )
        if self.grams_per_kwh is None:
            return text
        return f"{text}; CO2: {self.grams_per_kwh:g} g per kWh"


def read_power(given: str | None) -> Power:
    """`--grid`: grams per kWh, or a YAML file with fields of `Power`; raises `PowerError`."""
    if given is None:
        return Power()
    try:
        grams = float(given)
    except ValueError:
        path = Path(given)
        found: Power = build_dataclass(Power, read_yaml(path, PowerError), given, PowerError)
        return found
    if not 0 <= grams < math.inf:
        raise PowerError(f"--grid is {given!r}, expected grams of CO2 per kWh, or a file")
    return Power(grams_per_kwh=grams)

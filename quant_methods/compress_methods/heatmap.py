"""Where a compressed model lost what it lost: a picture of the error of every layer and module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError, OutputError
from compress_methods.files import write_picture

BLOCK = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
EXPERT = re.compile(r"\.\d+(?=\.)")
ERRORS = {"output_error": "error of the outputs", "weight_error": "error of the weights"}
MOST_LABELS = 40


def draw_heatmap(path: Path, modules: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Write a PNG of the errors in a report's `modules`: a row per layer, a column per kind.

    The outputs' error where every module has one, else the weights'; logarithmic, what is not
    compressed or has no error in grey. Raises `CheckpointError` where no module of a layer has an
    error, `OutputError` where the file cannot be written.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    measure, cells = _cells(modules)
    layers = range(max(layer for layer, _ in cells) + 1)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    positive = [value for value in cells.values() if value > 0]
    grid = [[cells.get((i, kind)) or float("nan") for kind in kinds] for i in layers]
    size = (3.2 + 0.55 * len(kinds), 2.2 + 0.24 * min(len(layers), MOST_LABELS))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")
    norm = LogNorm(min(positive), max(positive)) if len(set(positive)) > 1 else None
    image = axes.imshow(grid, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(layers[:: -(-len(layers) // MOST_LABELS)])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label=ERRORS[measure])
    try:
        write_picture(path, figure)
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror or problem}") from problem


def _cells(modules: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[tuple[int, str], float]]:
    """Which error, and its value by layer and kind; experts of a layer share a mean."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for name, facts in modules.items():
        if place := BLOCK.fullmatch(name):
            kind = EXPERT.sub("", f".{place[2]}")[1:]
            found.setdefault((int(place[1]), kind), []).append(facts)
    for measure in ERRORS:
        known = {
            cell: [facts[measure] for facts in some if facts.get(measure) is not None]
            for cell, some in found.items()
        }
        if known and all(len(known[cell]) == len(some) for cell, some in found.items()):
            return measure, {cell: sum(some) / len(some) for cell, some in known.items()}
    raise CheckpointError("report.json: no errors of layers to draw; convert writes them there")

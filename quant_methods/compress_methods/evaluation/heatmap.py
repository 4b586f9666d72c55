"""Where a compressed model lost what it lost, or would: pictures of the error of every layer and
module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError, OutputError
from compress_methods.system.files import write_picture

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
    from matplotlib.figure import Figure

    measure, cells = find_errors(modules)
    layers = range(max(layer for layer, _ in cells) + 1)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    size = (3.2 + 0.55 * len(kinds), 2.2 + 0.24 * min(len(layers), MOST_LABELS))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = _panel(axes, cells, kinds, _shared_scale(cells.values()))
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label=ERRORS[measure])
    _write(path, figure)


def draw_sensitivity(
    path: Path, losses: Mapping[str, Mapping[tuple[int, str], float]], title: str
) -> None:
    """Write a PNG of what (layer, group) loses in each format: a panel per format, on one scale of
    KL. Raises `OutputError` where the file cannot be written."""
    from matplotlib.figure import Figure

    cells = [cell for panel in losses.values() for cell in panel]
    layers, kinds = max(layer for layer, _ in cells) + 1, list(dict.fromkeys(k for _, k in cells))
    width = 1.6 + len(losses) * (0.9 + 0.45 * len(kinds))
    figure = Figure(figsize=(width, 2.4 + 0.24 * min(layers, MOST_LABELS)), layout="constrained")
    scale = _shared_scale(value for panel in losses.values() for value in panel.values())
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (name, panel) in zip(panels, losses.items(), strict=True):
        image = _panel(axes, panel, kinds, scale, layers)
        axes.set_title(name, fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.colorbar(image, ax=panels, label="KL, nats a token")
    _write(path, figure)


def _shared_scale(values: Iterable[float]) -> Any:
    """Logarithmic from the least to the greatest that is not 0; None where there are not two."""
    from matplotlib.colors import LogNorm

    positive = {value for value in values if value > 0}
    return LogNorm(min(positive), max(positive)) if len(positive) > 1 else None


def _panel(
    axes: Any,
    cells: Mapping[tuple[int, str], float],
    kinds: Sequence[str],
    scale: Any,
    count: int = 0,
) -> Any:
    """A row per layer, a column per kind; what is not known in grey."""
    layers = range(count or max(layer for layer, _ in cells) + 1)
    grid = [[cells.get((i, kind)) or float("nan") for kind in kinds] for i in layers]
    axes.set_facecolor("0.9")
    image = axes.imshow(grid, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(layers[:: -(-len(layers) // MOST_LABELS)])
    axes.set_ylabel("layer")
    return image


def _write(path: Path, figure: Any) -> None:
    try:
        write_picture(path, figure)
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror or problem}") from problem


def find_errors(
    modules: Mapping[str, Mapping[str, Any]],
) -> tuple[str, dict[tuple[int, str], float]]:
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

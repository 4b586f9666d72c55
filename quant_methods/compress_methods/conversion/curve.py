"""The curve a search saw, as a picture: how much perplexity rises as the model shrinks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_methods.conversion.chain import PruneTo
from compress_methods.files import write_picture


def draw_curve(
    path: Path,
    points: Sequence[dict[str, Any]],
    target: PruneTo,
    chosen: float,
    original_bytes: int,
) -> None:
    """Write a PNG of the `points` of a report's `search`, the bounds, and the level `chosen`."""
    from matplotlib.figure import Figure

    seen = [p for p in points if math.isfinite(p["increase"])]
    x = [100.0, *(100 * p["bytes"] / original_bytes for p in seen)]
    y = [0.0, *(100 * p["increase"] for p in seen)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, color="0.6", zorder=1)
    axes.scatter(x, y, c=["0.3", *("C0" if p["within"] else "C3" for p in seen)], zorder=2)
    for point, left, up in zip(seen, x[1:], y[1:], strict=True):
        label = f"{point['level']:.0%}" + (" (kept)" if point["level"] == chosen else "")
        axes.annotate(label, (left, up), textcoords="offset points", xytext=(6, 5))
    axes.annotate("original", (100, 0), textcoords="offset points", xytext=(6, 5))
    if target.perplexity_increase is not None:
        axes.axhline(100 * target.perplexity_increase, color="C3", linestyle=":", label="bound")
    if target.size is not None:
        axes.axvline(100 * target.size, color="C3", linestyle="--", label="bound on size")
    if target.size is not None or target.perplexity_increase is not None:
        axes.legend(loc="best", frameon=False)
    axes.invert_xaxis()
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("bytes, % of the original")
    axes.set_ylabel("perplexity on held-out text, % above the original")
    axes.grid(alpha=0.3)
    write_picture(path, figure)

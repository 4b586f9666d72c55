"""The curve a search saw, as a picture: what is lost as the model shrinks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_methods.recipe.stages import PruneTo
from compress_methods.system.files import write_picture


def draw_curve(
    path: Path,
    points: Sequence[dict[str, Any]],
    target: PruneTo,
    chosen: float,
    original_bytes: int,
) -> None:
    """Write a PNG of the `points` of a report's `search`, the bounds, and the level `chosen`: KL
    where that is bounded, else the rise of perplexity."""
    from matplotlib.figure import Figure

    by_kl = target.kl is not None
    key, scale = ("kl", 1) if by_kl else ("increase", 100)
    bound = target.kl if by_kl else target.perplexity_increase
    seen = [p for p in points if math.isfinite(p[key])]
    x = [100.0, *(100 * p["bytes"] / original_bytes for p in seen)]
    y = [0.0, *(scale * p[key] for p in seen)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, color="0.6", zorder=1)
    axes.scatter(x, y, c=["0.3", *("C0" if p["within"] else "C3" for p in seen)], zorder=2)
    for point, left, up in zip(seen, x[1:], y[1:], strict=True):
        label = f"{point['level']:.0%}" + (" (kept)" if point["level"] == chosen else "")
        axes.annotate(label, (left, up), textcoords="offset points", xytext=(6, 5))
    axes.annotate("original", (100, 0), textcoords="offset points", xytext=(6, 5))
    if bound is not None:
        axes.axhline(scale * bound, color="C3", linestyle=":", label="bound")
    if target.size is not None:
        axes.axvline(100 * target.size, color="C3", linestyle="--", label="bound on size")
    if target.size is not None or bound is not None:
        axes.legend(loc="best", frameon=False)
    axes.invert_xaxis()
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("bytes, % of the original")
    what = "KL to the original, nats a token" if by_kl else "perplexity, % above the original"
    axes.set_ylabel(f"{what}, on held-out text")
    axes.grid(alpha=0.3)
    write_picture(path, figure)

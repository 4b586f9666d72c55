"""The pictures of a report, as SVG text that can stand in a page.

Two kinds: the interval of one metric with its margin, drawn here line by line because there is one
in every row of a table, and distributions over prompts, drawn by matplotlib. A is always blue, B
always orange. Many points are drawn as pixels, or the page would grow by megabytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_compress.operations.abtest.replay.measure import PairOfAnswers

BLUE, ORANGE, GREY = "#2f6db3", "#d9771e", "#8a8f98"
VERDICT_COLOURS = {"non-inferior": "#1f8a4c", "inferior": "#c62f2f", "undecided": "#a86f00"}
WIDTH, HEIGHT, EDGE = 300, 40, 20
BAR, LABEL = 14, 35
MANY = 2000
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-compress",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e7e9ec",
    "axes.axisbelow": True,
}


def interval(row: Mapping[str, Any]) -> str:
    """Interval, "no change" (dashed) and the side beyond the limit (red) of one metric's row."""
    if row["value"] is None or row["low"] is None or row["high"] is None:
        return ""
    place = _scale(row)
    colour = VERDICT_COLOURS.get(row["verdict"], GREY)
    parts = [*_beyond(row, place)]
    neutral = _neutral(row)
    if neutral is not None:
        x = place(neutral)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="26" stroke="{GREY}" '
            'stroke-dasharray="3 2"/>'
        )
    low, value, high = (place(row[key]) for key in ("low", "value", "high"))
    parts.append(
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{BAR}" y2="{BAR}" stroke="{colour}" '
        f'stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{value:.1f}" cy="{BAR}" r="4.5" fill="{colour}"/>'
    )
    parts += _labels(row, place, neutral)
    return (
        f'<svg class="interval" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    )


def _neutral(row: Mapping[str, Any]) -> float | None:
    """The value of two equal servers; 0 for a divergence, which is no change either."""
    if row["change"] == "ratio":
        return 1.0
    return 0.0 if row["change"] == "difference" or row["worse"] == "above" else None


def _bounds(row: Mapping[str, Any]) -> list[float]:
    if row["limit"] is None:
        return []
    return [1 / row["limit"], row["limit"]] if row["worse"] == "both" else [row["limit"]]


def _scale(row: Mapping[str, Any]) -> Callable[[float], float]:
    """Map values to pixels; logarithmic for ratios."""
    straight = math.log if row["change"] == "ratio" else float
    neutral = _neutral(row)
    shown = [row["low"], row["high"], *_bounds(row), *([] if neutral is None else [neutral])]
    ends = [straight(max(value, 1e-9) if straight is math.log else value) for value in shown]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        at = straight(max(value, 1e-9) if straight is math.log else value)
        return EDGE + (at - low) / span * (WIDTH - 2 * EDGE)

    return place


def _beyond(row: Mapping[str, Any], place: Callable[[float], float]) -> list[str]:
    """The region of values that are worse than the margin allows."""
    bounds = [place(bound) for bound in _bounds(row)]
    if not bounds:
        return []
    regions = {
        "above": [(bounds[-1], float(WIDTH))],
        "below": [(0.0, bounds[0])],
        "both": [(0.0, bounds[0]), (bounds[-1], float(WIDTH))],
    }[row["worse"]]
    shade = [
        f'<rect x="{a:.1f}" y="2" width="{b - a:.1f}" height="24" fill="#f9dcdc"/>'
        for a, b in regions
    ]
    lines = [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="26" stroke="#c62f2f"/>' for x in bounds]
    return shade + lines


def _labels(
    row: Mapping[str, Any], place: Callable[[float], float], neutral: float | None
) -> list[str]:
    """Numbers under the limit and under "no change", unless they would touch."""
    marks = [(place(bound), f"{bound:.4g}", "#c62f2f") for bound in _bounds(row)]
    if neutral is not None and all(abs(x - place(neutral)) > 34 for x, _, _ in marks):
        marks.append((place(neutral), f"{neutral:g}", GREY))
    return [
        f'<text x="{min(max(x, EDGE), WIDTH - EDGE):.1f}" y="{LABEL}" fill="{colour}" '
        f'font-size="10" text-anchor="middle">{text}</text>'
        for x, text, colour in marks
    ]


def distributions(pairs: Sequence[PairOfAnswers]) -> list[tuple[str, str]]:
    """Title and SVG of every picture there are data for."""
    answered = [pair for pair in pairs if pair.answered]
    scored = [(p, p.logprobs) for p in answered if p.logprobs and p.logprobs.tokens]
    ttft = [(p.a.ttft, p.b.ttft) for p in answered if p.a.ttft and p.b.ttft]
    tpot = [(p.a.tpot, p.b.tpot) for p in answered if p.a.tpot and p.b.tpot]
    found = []
    if ttft:
        found.append(("Time to first token", _shares(ttft, "seconds")))
    if tpot:
        found.append(("Time per output token", _shares(tpot, "seconds")))
    if scored:
        nats = [(s.nll_a / s.tokens, s.nll_b / s.tokens) for _, s in scored]
        found.append(("How unlikely each prompt is, and how much more so to B", _scatter(nats)))
    if answered:
        same = [pair.same_tokens / max(pair.lengths) for pair in answered]
        found.append(("Output tokens before the first other one", _histogram(same)))
    return found


def _shares(values: Sequence[tuple[float, float]], label: str) -> str:
    """Share of prompts (up) within a time (right), of both sides."""

    def draw(axes: Any) -> None:
        for side, colour, name in ((0, BLUE, "A"), (1, ORANGE, "B")):
            times = np.sort([pair[side] for pair in values])
            axes.step(
                np.concatenate([times[:1], times]),
                np.arange(len(times) + 1) / len(times),
                where="post",
                color=colour,
                lw=2,
                label=f"{name}, median {np.median(times):.3g} s",
            )
        axes.set(xlabel=label, ylabel="share of prompts", ylim=(0, 1.02))
        every = np.array(values)
        if every.max() > 20 * every.min():
            axes.set_xscale("log")
        axes.legend(frameon=False, loc="lower right")

    return _picture(draw)


def _scatter(values: Sequence[tuple[float, float]]) -> str:
    """One point per prompt: how unlikely it is to A (right) and how much more so to B (up)."""

    def draw(axes: Any) -> None:
        points = np.array(values)
        axes.axhline(0, color=GREY, lw=1, ls="--")
        axes.scatter(
            points[:, 0],
            points[:, 1] - points[:, 0],
            s=14,
            alpha=0.6,
            color=ORANGE,
            edgecolors="none",
            rasterized=len(points) > MANY,
        )
        axes.set(xlabel="A, nats per token", ylabel="B − A")

    return _picture(draw)


def _histogram(values: Sequence[float]) -> str:
    def draw(axes: Any) -> None:
        axes.hist(values, bins=np.linspace(0, 1, 21), color=ORANGE, edgecolor="white")
        axes.set(xlabel="share of the output (1: the whole output is the same)", ylabel="prompts")

    return _picture(draw)


def _picture(draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, dpi=150)
    svg = out.getvalue()
    return re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", svg[svg.index("<svg") :], count=1)

"""The picture of the README: checkpoint, convert, vLLM, endpoint and metrics, with the sizes and
the speed that `serving` has measured. An SVG without anything that depends on a machine."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, HEIGHT = 980, 190
TOP, TALL, WIDE = 24, 92, 182
INK, MUTED, LINE = "#1f2933", "#52606d", "#9aa5b1"


def box(x: int, y: int, height: int, fill: str, *lines: str) -> list[str]:
    """A title and lines below it, in the middle of a rounded rectangle."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{height}" rx="8" fill="{fill}" '
        f'stroke="{LINE}"/>'
    ]
    first = y + height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        style = f'font-weight="600" fill="{INK}"' if i == 0 else f'font-size="12" fill="{MUTED}"'
        parts.append(text(x + WIDE / 2, first + 18 * i, line, style))
    return parts


def text(x: float, y: float, said: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style}>{escape(said)}</text>'


def arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="{MUTED}" marker-end="url(#head)"/>'


def picture(serving: dict[str, Any]) -> str:
    rows = {row["format"]: row for row in serving["rows"]}
    before, after = rows["bf16"], rows["int4"]
    speed = before["loads"][0]["tpot"] / after["loads"][0]["tpot"]
    sizes = [f"{row['bytes'] / 1e9:.2f} GB" for row in (before, after)]
    xs = [20, 276, 532, 778]
    middle = TOP + TALL // 2
    half = TALL // 2 - 6
    small = f'font-size="12" font-family="monospace" fill="{MUTED}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="14">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *box(xs[0], TOP, TALL, "#f0f4f8", "checkpoint", "Hugging Face, bf16", sizes[0]),
        *box(xs[1], TOP, TALL, "#e3f8ff", "compressed", "int4, with a report", sizes[1]),
        *box(xs[2], TOP, TALL, "#f0f4f8", "vLLM, unmodified", "finds the plugin", "CPU or GPU"),
        *box(xs[3], TOP - 12, half + 6, "#e3f9e5", "OpenAI endpoint", f"{speed:.2f}x the speed"),
        *box(xs[3], middle + 12, half + 6, "#e3f9e5", "/metrics", "by deployment"),
        arrow(xs[0] + WIDE, middle, xs[1], middle),
        arrow(xs[1] + WIDE, middle, xs[2], middle),
        arrow(xs[2] + WIDE, middle - 12, xs[3], TOP + 12),
        arrow(xs[2] + WIDE, middle + 12, xs[3], middle + 34),
        text((xs[0] + WIDE + xs[1]) / 2, middle - 10, "convert", small),
        text((xs[1] + WIDE + xs[2]) / 2, middle - 10, "serve", small),
    ]
    below = ["check, plan", "inspect, eval", "gateway, rollout, compare", "dashboard"]
    parts += [
        text(x + WIDE / 2, TOP + TALL + 32, said, small) for x, said in zip(xs, below, strict=True)
    ]
    amx = " with AMX" * ("amx_int8" in serving["machine"]["instructions"])
    note = "sizes, and speed of one request: Llama of 1.2 billion parameters, "
    note += f"{serving['machine']['cores']} CPU cores{amx} (python -m tests.benchmarks serving)"
    parts.append(text(WIDTH / 2, HEIGHT - 14, note, f'font-size="11" fill="{MUTED}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"

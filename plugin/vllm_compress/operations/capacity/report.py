"""A plan as text and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from vllm_compress.operations.capacity.footprint.memory import gb, rank_kv_values
from vllm_compress.operations.capacity.footprint.shapes import ModelShape
from vllm_compress.operations.capacity.plan import Option
from vllm_compress.operations.capacity.schedule import Schedule
from vllm_compress.operations.capacity.search import Rejected
from vllm_compress.operations.capacity.throughput.demand import Demand, duration
from vllm_compress.operations.text_table import WIDTH, align, fold

HEADER = (
    *("scheme", "hardware", "weights", "by weights", "fits on", "replica", "replicas", "devices"),
    *("ttft p50 / p95", "tpot p50 / p95", "tokens/s", "at most", "per hour", "per M tokens"),
    *("watts", "kWh per M", "kg CO2 per M"),
)
LEFT = (0, 1)
REASONS = 5
BASIS = {
    "measured": "measured on this deployment",
    "scaled": "roofline, corrected by what another deployment measured on this hardware",
    "roofline": "roofline with assumed efficiencies; calibrate before relying on it",
}


def to_dict(
    shape: ModelShape,
    demand: Demand,
    options: Sequence[Option],
    kv_value_bytes: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The object of --json; numbers that are not known are null."""
    trace = demand.trace
    asked = asdict(replace(demand, trace=None))
    if trace is not None:
        asked["trace"] = {
            "name": trace.name,
            "requests": len(trace.arrivals),
            "shared": trace.shared,
        }
    return {
        "model": shape.name,
        "weights": shape.parameters,
        "kv_bytes_per_token": shape.kv_layers * rank_kv_values(shape, 1) * kv_value_bytes,
        "state_bytes_per_request": shape.state_bytes,
        "demand": asked,
        "options": [_finite(asdict(option)) for option in options],
        "notes": list(notes),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(
    shape: ModelShape,
    demand: Demand,
    options: Sequence[Option],
    kv_value_bytes: int,
    notes: Sequence[str],
) -> str:
    """Tables and reasons for a terminal."""
    lines = [_model(shape, kv_value_bytes), _demand(demand), ""]
    lines += fold([HEADER, *map(_row, options)], LEFT)
    lines += ["", *(line for option in options for line in _reasons(option))]
    bases = {option.basis for option in options if option.basis}
    lines += [f"latencies: {BASIS[basis]}" for basis in BASIS if basis in bases]
    return "\n".join(wrapped for line in [*lines, *notes] for wrapped in _wrap(line))


def _wrap(line: str) -> list[str]:
    """A line that keeps to the width of a table, what continues it further in."""
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _model(shape: ModelShape, kv_value_bytes: int) -> str:
    token = shape.kv_layers * rank_kv_values(shape, 1) * kv_value_bytes
    text = f"{shape.name}: {shape.parameters / 1e9:.1f} billion weights, "
    text += f"{token:,} bytes of KV cache per token"
    if shape.state is not None:
        text += f", {shape.state_bytes:,} of state per request in {shape.state.layers} layers"
    for part in shape.attention:
        if part.window is not None:
            text += f", {part.layers} of {shape.layers} layers look back {part.window:,} tokens"
    return text


def _demand(demand: Demand) -> str:
    rate = f"{demand.rate:.4g}/s" if demand.rate >= 1 else f"{60 * demand.rate:.4g}/min"
    bounds = ", ".join(str(objective) for objective in demand.objectives)
    lengths = f"{demand.prompt:,} + {demand.output:,} tokens"
    if demand.trace is not None:
        lengths += f" on average ({len(demand.trace.arrivals):,} of {demand.trace.name})"
    if demand.cached:
        lengths += f", {100 * demand.cached:.3g}% of prompts cached"
    return f"requests: {rate} of {lengths}, contexts up to {demand.context:,}; {bounds}"


def render_day(day: Schedule) -> str:
    """The timetable of a day, hours alike in one line, and its sums."""
    rows = [("hours", "requests/s", "replicas", "devices", "watts")]
    numbered = list(enumerate(day.hours))
    for replicas, group in groupby(numbered, key=lambda each: each[1].replicas):
        alike = list(group)
        rates = [hour.rate for _, hour in alike]
        watts = [hour.watts for _, hour in alike if hour.watts is not None]
        low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
        rows.append(
            (
                f"{alike[0][0]:02d}-{alike[-1][0] + 1:02d}",
                low if low == high else f"{low} to {high}",
                str(replicas),
                str(alike[0][1].devices),
                f"{sum(watts) / len(watts):,.0f}" if watts else "-",
            )
        )
    known = day.to_dict()
    always = known["device_hours_at_peak"]
    total = f"a day: {day.device_hours} device-hours, not {always} as at the peak"
    if day.price is not None:
        cost, most = known["price_per_day"], known["price_per_day_at_peak"]
        total += f"; {cost:,.2f}, not {most:,.2f} ({100 * day.device_hours / always:.0f}%)"
    if day.kwh is not None:
        total += f"; {day.kwh:,.3g} kWh"
    title = f"replicas by the hour, {day.scheme} on {day.hardware}:"
    return "\n".join(["", title, *align(rows, (0,)), total])


def _row(option: Option) -> tuple[str, ...]:
    head = (
        f"{option.scheme} ({option.label})",
        option.hardware,
        gb(option.weight_bytes),
        str(option.devices_for_weights),
        "-" if option.smallest is None else str(option.smallest),
    )
    if not option.meets or option.latency is None:
        return (*head, "none", *[""] * (len(HEADER) - len(head) - 1))

    def pair(values: dict[str, float]) -> str:
        return f"{duration(values['p50'])} / {duration(values['p95'])}"

    return (
        *head,
        str(option.layout),
        str(option.replicas),
        str(option.devices),
        pair(option.latency.ttft),
        pair(option.latency.tpot),
        f"{option.tokens_per_second:,.0f}",
        f"{option.capacity:,.0f}",
        _figure(option.price_per_hour, ".2f"),
        _figure(option.price_per_million, ".2f"),
        _figure(option.watts, ",.0f"),
        _figure(option.kwh_per_million, ".3g"),
        _figure(option.co2_kg_per_million, ".3g"),
    )


def _figure(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _reasons(option: Option) -> list[str]:
    """Say why it is no smaller than it is, or why it is not at all."""
    title = f"{option.scheme} on {option.hardware}"
    if not option.meets:
        lines = [f"{title}: {option.closest}"] if option.closest else [f"{title}: does not fit"]
        few = [r for r in option.rejected if r.reason not in option.closest]
    else:
        lines = [f"{title}: {count_of(option.devices)}, {option.replicas} x {option.layout}"]
        few = [r for r in option.rejected if r.devices < option.devices]
        if option.draft is not None:
            lines.append(f"  {_drafted(option.draft)}")
    few = [r for r in few if r.devices >= option.devices_for_weights]
    return [*lines, *(f"  {_said(r)}" for r in few[:REASONS])]


def _drafted(draft: dict[str, Any]) -> str:
    made = f"{draft['tokens_per_step']:.2g} tokens a step at this load"
    return (
        f"{draft['acceptance']:.0%} of drafted tokens accepted, {made}: "
        f"serve --draft-tokens {draft['draft_tokens']}"
    )


def _said(rejected: Rejected) -> str:
    return f"not {count_of(rejected.devices)} ({rejected.layout}): {rejected.reason}"


def count_of(devices: int) -> str:
    return f"{devices} device{'s' if devices > 1 else ''}"

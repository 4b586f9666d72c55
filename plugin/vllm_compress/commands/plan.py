"""`vllm-compress plan MODEL`: what hardware a model needs in every scheme, before converting it.

Reads shapes, not weights, and needs neither a GPU nor the network; seconds only where a server is
asked (`--calibrate URL`) or a recipe of your own has to be understood.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.errors import CompressError, RecipeError, named
from compress_methods.recipe.matching import recipe_names
from compress_methods.system.files import write_text
from vllm_compress.names import QUANT_METHOD
from vllm_compress.operations.capacity.advice import DEFAULT, USES
from vllm_compress.operations.capacity.calibration.fit import Calibration, to_json
from vllm_compress.operations.capacity.footprint.shapes import (
    ModelShape,
    load_shape,
    shipped_shapes,
)
from vllm_compress.operations.capacity.footprint.storage import (
    EXPERTS_HANDED,
    Scheme,
    apply_recipe,
    as_it_is,
)
from vllm_compress.operations.capacity.hardware import (
    Hardware,
    find_hardware,
    posted_note,
    with_prices,
)
from vllm_compress.operations.capacity.picture import Point, draw, points_of
from vllm_compress.operations.capacity.plan import Option, Planner
from vllm_compress.operations.capacity.power import read_power
from vllm_compress.operations.capacity.report import render, render_day, to_dict
from vllm_compress.operations.capacity.schedule import (
    Schedule,
    plan_day,
    read_profile,
    scaled,
)
from vllm_compress.operations.capacity.throughput.demand import (
    Demand,
    DemandError,
    parse_objective,
    parse_rate,
    parse_share,
)
from vllm_compress.operations.capacity.throughput.kernels import kernel_notes
from vllm_compress.operations.capacity.throughput.performance import kernels_used
from vllm_compress.operations.capacity.throughput.trace import read_trace

DESCRIPTION = "Say how many devices a model needs, at what latency and price, before converting it."
EPILOG = """\
examples:
  vllm-compress plan llama-4-scout --hardware h100-80gb --rate 20/s --input 1000 --output 200 \\
      --ttft 'p95<500ms' --tpot 'p95<50ms' --price h100-80gb=2.5
  vllm-compress plan ./model --recipe int4-gptq --recipe my.yaml --hardware l40s,l4 --rate 2/s
  vllm-compress plan ./out --hardware local --rate 30/min --calibrate http://localhost:8000 \\
      --save-calibration here.json
  vllm-compress plan llama-3.1-8b --hardware l4,l40s --trace conversation_trace.jsonl \\
      --prefix-cached 40% --prices spot.yaml --grid 56 --plot cost.png
  vllm-compress plan llama-3.1-8b --hardware local --rate 1/min --draft int4-gptq=90%
  vllm-compress plan llama-3.1-8b --hardware l4 --profile day.csv --price l4=0.7

Latencies are percentiles of a simulation of vLLM's continuous batching; its steps take what a
roofline says, or what was measured: --calibrate takes a file, a served model (asked one request at
a time for a minute and a half) or a Prometheus that scrapes one. Weights are exact, the rest of
the memory is an estimate of a few percent of a device.

--trace takes a .jsonl of Mooncake (timestamp in ms, input_length, output_length), a .csv of Azure
(TIMESTAMP, ContextTokens, GeneratedTokens) or the .json report of one guidellm benchmark. Replicas
get its requests in turn, and a long trace is judged by its busiest stretch. --profile takes 24
rates of requests per second, a YAML list or a .csv with hour and rate: the plan is for the highest,
and the best option's replicas and cost are listed by the hour.

--draft takes a recipe, or the directory of a result, that writes tokens ahead (`serve --draft`),
and the share of them that the model accepts: `int3=80%`, or a file that `eval --json` wrote. A
result that was measured on held-out text says its own. How far it writes ahead is chosen by the
number of requests at once: `5,8:2,32:0` is 5, from 8 requests on 2, from 32 on none.

Energy: a device draws 75% of its rated watts (configs/hardware.yaml) while a step runs and 12%
between, host and cooling left out. --grid FILE is YAML with busy and idle (shares), overhead (watts
at the meter for each of a device, such as 1.4) and grams_per_kwh (CO2; of your grid: about 20 to
800). All energy is put on output tokens.

--json prints one object: model, weights, kv_bytes_per_token, state_bytes_per_request (of Mamba and
linear attention), demand, notes, and options, best first: scheme, label, hardware, weight_bytes,
devices_for_weights (by weights alone), smallest (that holds one request of --context), meets,
layout, devices_per_replica, replicas, devices, basis (measured, scaled, roofline), memory (bytes
per device; requests at once), latency (ttft and tpot in seconds by percentile, preemptions,
running), tokens_per_second, capacity (the most, output tokens), price_per_hour, price_per_million
(output tokens), watts, kwh_per_million, co2_kg_per_million, misses (worst percentile over its
bound), closest, rejected (layout, devices, reason), draft (null without one: acceptance,
draft_tokens, as serve takes them, tokens_per_step at this load). With --profile a schedule: hours
(rate, replicas, devices, watts), device_hours and price_per_day, also at_peak. With --plot the
points drawn. Exit code 2 when nothing meets the objectives.
"""


class PlanError(CompressError):
    """A plan without an answer."""


def add_parser(subparsers: Any) -> None:
    shapes = shipped_shapes()
    parser = subparsers.add_parser("plan", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", help=f"model directory, or a shape: {', '.join(shapes)}"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="RECIPE",
        help=f"scheme to plan beside the original, repeatable: {', '.join(recipe_names())}, a file",
    )
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAMES",
        help="machines of configs/hardware.yaml, by comma; `local` is this one",
    )
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="DRAFT[=SHARE]",
        help="plan each scheme with this draft too, see below; repeatable",
    )
    _add_demand(parser.add_argument)
    _add_costs(parser.add_argument)
    parser.add_argument(
        "--kv-cache", choices=("auto", "fp8"), default="auto", help="KV-cache values"
    )
    parser.add_argument("--calibrate", metavar="URL|FILE", help="server, Prometheus or file")
    parser.add_argument("--deployment", metavar="NAME", help="whose history to take of Prometheus")
    parser.add_argument("--save-calibration", metavar="FILE", help="keep what was measured")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_demand(add: Callable[..., Any]) -> None:
    add("--rate", help="requests: 20/s, 300/min; of --trace or --profile, the rate to scale it to")
    add("--trace", metavar="FILE", help="requests as they came: times and lengths, see below")
    add("--profile", metavar="FILE", help="requests/s of 24 hours, for replicas by the hour")
    add("--use", choices=("chat", "rag", "batch"), help="what it is for: advice")
    add("--input", type=_count, metavar="TOKENS", help="prompt (default 1000)")
    add("--output", type=_count, metavar="TOKENS", help="answer (default 200)")
    add("--context", type=_count, metavar="TOKENS", help="longest request (8192)")
    add("--prefix-cached", metavar="SHARE", help="of prompts' tokens, in the prefix cache: 40%%")
    add("--ttft", metavar="BOUND", help="time to first token, such as 'p95<500ms'")
    add("--tpot", metavar="BOUND", help="time per output token, 'p95<50ms'")


def _add_costs(add: Callable[..., Any]) -> None:
    add("--price", action="append", default=[], metavar="NAME=PRICE", help="of a device-hour")
    add("--prices", metavar="FILE", help="YAML of NAME: PRICE, such as today's spot prices")
    add("--grid", metavar="GRAMS|FILE", help="of CO2 per kWh, or all that energy assumes, below")
    add("--plot", metavar="FILE.png", help="draw cost against latency, of more deployments")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


@dataclass(frozen=True)
class Found:
    """All there is to print: options best first, each with its scheme and machine."""

    shape: ModelShape
    planner: Planner
    options: list[tuple[Scheme, Hardware, Option]]
    notes: list[str]
    day: Schedule | None = None
    points: tuple[Point, ...] = ()


def run(args: argparse.Namespace) -> int:
    if args.plot and not (Path(args.plot).suffix == ".png" and Path(args.plot).parent.is_dir()):
        raise PlanError(f"--plot is {args.plot!r}, expected NAME.png in a directory that exists")
    rates = _rates(args)
    found = _plan(args, rates)
    best = found.options[0][2]
    if rates is not None and best.meets:
        scheme, machine, _ = found.options[0]
        found = replace(found, day=plan_day(found.planner, scheme, machine, best, rates))
    if args.plot:
        found = replace(found, points=_draw(Path(args.plot), found))
    _print(args, found)
    if not best.meets:
        demand = found.planner.demand
        wanted = " and ".join(str(objective) for objective in demand.objectives)
        raise PlanError(
            f"no option meets {wanted} at {demand.rate:.3g}/s; "
            f"the closest is {best.scheme} on {best.hardware}: {best.closest}"
        )
    return 0


def _rates(args: argparse.Namespace) -> list[float] | None:
    """Requests per second of 24 hours, None without a profile."""
    if not args.profile:
        return None
    rates = read_profile(Path(args.profile))
    return scaled(rates, parse_rate(args.rate)) if args.rate else rates


def _plan(args: argparse.Namespace, rates: list[float] | None) -> Found:
    power = read_power(args.grid)
    shape = load_shape(args.model)
    names = [name.strip() for name in args.hardware.split(",")]
    prices = Path(args.prices) if args.prices else None
    machines = [find_hardware(name) for name in dict.fromkeys(names)]
    machines = with_prices(machines, args.price, prices)
    demand = _demand(args, shape, rates)
    schemes, notes = _schemes(args, shape)
    calibration, reference = _calibration(args, schemes, machines)
    if args.draft:
        # Here, because no other plan needs it.
        from vllm_compress.operations.capacity.drafts import with_drafts

        schemes += with_drafts(schemes, args.draft, shape)
    value_bytes = 1 if args.kv_cache == "fp8" else 2
    planner = Planner(demand, value_bytes, calibration, reference, args.seed, power)
    every = {(scheme.name, m.key): (scheme, m) for scheme in schemes for m in machines}
    options = [(*every[o.scheme, o.hardware], o) for o in planner.plan(schemes, machines)]
    if any(option.watts is not None for _, _, option in options):
        notes.append(power.said)
    said = posted_note(machines)
    notes += [said] if said else []
    uses = [kernels_used(scheme, machine) for scheme, machine in every.values()]
    notes += kernel_notes([use for some in uses for use in some])
    if demand.trace is not None and demand.trace.shared is not None:
        share = f"{100 * demand.trace.shared:.0f}%"
        notes.append(f"trace: at most {share} of prompts could be cached (--prefix-cached)")
    return Found(shape, planner, options, notes)


def _draw(path: Path, found: Found) -> tuple[Point, ...]:
    """Draw what was found, and more deployments beside it."""
    points = [p for option in found.options for p in points_of(found.planner, *option)]
    if not points:
        found.notes.append("nothing is drawn: no deployment comes near the objectives")
        return ()
    try:
        draw(path, points, found.planner.demand)
    except OSError as problem:
        raise PlanError(named(problem, path)) from problem
    return tuple(points)


def _print(args: argparse.Namespace, found: Found) -> None:
    planner, options = found.planner, [option for _, _, option in found.options]
    asked = (found.shape, planner.demand, options, planner.kv_value_bytes, found.notes)
    if args.json:
        block = to_dict(*asked)
        if found.day is not None:
            block["schedule"] = found.day.to_dict()
        if found.points:
            block["points"] = [asdict(point) for point in found.points]
        print(json.dumps(block, indent=2))
        return
    print(render(*asked), flush=True)
    if found.day is not None:
        print(render_day(found.day))
    if found.points:
        print(f"cost against latency: {args.plot}")


def _demand(args: argparse.Namespace, shape: ModelShape, rates: list[float] | None) -> Demand:
    usual = USES[args.use] if args.use else DEFAULT
    trace = read_trace(Path(args.trace)) if args.trace else None
    prompt, output = args.input or usual.prompt, args.output or usual.output
    longest, whose = prompt + output, "--input and --output are"
    if trace is not None:
        if args.input or args.output:
            raise DemandError("--input and --output do not go with --trace, which has its lengths")
        (prompt, output), longest = trace.means, trace.longest
        whose = f"the longest request of {args.trace} is"
    context = args.context or min(shape.context, max(8192, longest))
    if longest > context:
        raise DemandError(
            f"{whose} {longest:,} tokens together, more than the context of {context:,}"
        )
    if context > shape.context:
        raise DemandError(f"--context is {context:,}, {shape.name} has {shape.context:,}")
    if rates is None and not args.rate and trace is None:
        raise DemandError("--rate is missing, expected it, --trace or --profile")
    rate = max(rates) if rates else parse_rate(args.rate) if args.rate else None
    cached = parse_share(args.prefix_cached) if args.prefix_cached else 0.0
    objectives = (
        parse_objective("ttft", args.ttft or usual.ttft),
        parse_objective("tpot", args.tpot or usual.tpot),
    )
    demand = Demand(
        trace.rate if trace else 1.0, prompt, output, context, objectives, cached, trace
    )
    return demand if rate is None else demand.at_rate(rate)


def _schemes(args: argparse.Namespace, shape: ModelShape) -> tuple[list[Scheme], list[str]]:
    """The original, then each recipe; what the user should know of them."""
    usual = USES[args.use] if args.use else DEFAULT
    schemes, notes = [as_it_is(shape)], [f"advice for {args.use}: {why}" for why in usual.why]
    usually = () if shape.quantized is not None else usual.recipes
    for recipe in args.recipe or usually:
        try:
            schemes.append(apply_recipe(shape, recipe))
        except RecipeError as problem:
            if args.recipe:
                raise
            notes.append(f"left out: {problem}")
    said = _kv_cache_note(args, shape)
    notes += [said] if said else []
    if any(scheme.experts_compressed for scheme in schemes[1:]):
        notes.append(EXPERTS_HANDED)
    return schemes, notes


def _kv_cache_note(args: argparse.Namespace, shape: ModelShape) -> str | None:
    """What scales say of --kv-cache; the scheme alone halves nothing, a server's option does."""
    if shape.path is None or shape.quantized != QUANT_METHOD:
        return None
    has = open_compressed(shape.path).spec.kv_cache is not None
    if args.kv_cache == "auto":
        asked = (
            "the model has scales for an FP8 KV cache: --kv-cache fp8 plans one of half the size"
        )
        return asked if has else None
    if has:
        return "FP8 KV cache: serve with --kv-cache-dtype fp8"
    return "the model has no scales for an FP8 KV cache: vLLM would take 1 for all"


def _calibration(
    args: argparse.Namespace, schemes: list[Scheme], machines: list[Hardware]
) -> tuple[Calibration | None, Scheme | None]:
    if not args.calibrate:
        return None, None
    # Here, because it needs a client of HTTP, which no other plan does.
    from vllm_compress.operations.capacity.calibration.sources import load_calibration, reference_of

    found = load_calibration(args.calibrate, schemes, machines, args.deployment)
    if args.save_calibration:
        write_text(Path(args.save_calibration), to_json(found))
    return found, reference_of(found, schemes)

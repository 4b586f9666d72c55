"""`vllm-compress plan MODEL`: what hardware a model needs in every scheme, before converting it.

Reads shapes, not weights, and needs neither a GPU nor the network; seconds only where a server is
asked (`--calibrate URL`) or a recipe of your own has to be understood.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, RecipeError
from compress_methods.recipe.matching import recipe_names
from compress_methods.system.files import write_text
from vllm_compress.operations.capacity.advice import DEFAULT, USES
from vllm_compress.operations.capacity.calibration.fit import Calibration, to_json
from vllm_compress.operations.capacity.footprint.shapes import (
    ModelShape,
    load_shape,
    shipped_shapes,
)
from vllm_compress.operations.capacity.footprint.storage import (
    EXPERTS_ON_CPUS,
    Scheme,
    apply_recipe,
    as_it_is,
)
from vllm_compress.operations.capacity.hardware import Hardware, find_hardware, with_prices
from vllm_compress.operations.capacity.plan import Planner
from vllm_compress.operations.capacity.power import read_power
from vllm_compress.operations.capacity.report import render, to_dict
from vllm_compress.operations.capacity.throughput.demand import (
    Demand,
    DemandError,
    parse_objective,
    parse_rate,
)

DESCRIPTION = "Say how many devices a model needs, at what latency and price, before converting it."
EPILOG = """\
examples:
  vllm-compress plan llama-4-scout --hardware h100-80gb --rate 20/s --input 1000 --output 200 \\
      --ttft 'p95<500ms' --tpot 'p95<50ms' --price h100-80gb=2.5
  vllm-compress plan ./model --recipe int4-gptq --recipe my.yaml --hardware l40s,l4 --rate 2/s
  vllm-compress plan ./out --hardware local --rate 30/min --calibrate http://localhost:8000 \\
      --save-calibration here.json

Latencies are percentiles of a simulation of vLLM's continuous batching; its steps take what a
roofline says, or what was measured: --calibrate takes a file, a served model (asked one request at
a time for a minute and a half) or a Prometheus that scrapes one. Weights are exact, the rest of
the memory is an estimate of a few percent of a device.

--json prints one object: model, weights, kv_bytes_per_token, demand, notes, and options, best
first: scheme, label, hardware, weight_bytes, devices_for_weights (by weights alone), smallest (that
holds one request of --context), meets, layout, devices_per_replica, replicas, devices, basis
(measured, scaled, roofline), memory (bytes per device; requests at once), latency (ttft and tpot in
seconds by percentile, preemptions, running), tokens_per_second, capacity (the most, output tokens),
price_per_hour, price_per_million (output tokens), misses (worst percentile over its bound),
closest, rejected (layout, devices, reason). Exit code 2 when nothing meets the objectives.
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
    parser.add_argument("--rate", required=True, help="requests: 20/s, 300/min")
    parser.add_argument("--use", choices=("chat", "rag", "batch"), help="what it is for: advice")
    parser.add_argument("--input", type=_count, metavar="TOKENS", help="prompt (default 1000)")
    parser.add_argument("--output", type=_count, metavar="TOKENS", help="answer (default 200)")
    parser.add_argument("--context", type=_count, metavar="TOKENS", help="longest request (8192)")
    parser.add_argument("--ttft", metavar="BOUND", help="time to first token, such as 'p95<500ms'")
    parser.add_argument("--tpot", metavar="BOUND", help="time per output token, 'p95<50ms'")
    parser.add_argument(
        "--kv-cache", choices=("auto", "fp8"), default="auto", help="KV-cache values"
    )
    parser.add_argument(
        "--price", action="append", default=[], metavar="NAME=PRICE", help="of a device-hour"
    )
    parser.add_argument("--grid", metavar="GRAMS|FILE", help="CO2 per kWh, or all of energy; below")
    parser.add_argument("--calibrate", metavar="URL|FILE", help="server, Prometheus or file")
    parser.add_argument("--deployment", metavar="NAME", help="whose history to take of Prometheus")
    parser.add_argument("--save-calibration", metavar="FILE", help="keep what was measured")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


def run(args: argparse.Namespace) -> int:
    shape = load_shape(args.model)
    names = [name.strip() for name in args.hardware.split(",")]
    machines = with_prices([find_hardware(name) for name in dict.fromkeys(names)], args.price)
    demand = _demand(args, shape)
    schemes, notes = _schemes(args, shape)
    calibration, reference = _calibration(args, schemes, machines)
    value_bytes = 1 if args.kv_cache == "fp8" else 2
    power = read_power(args.grid)
    planner = Planner(demand, value_bytes, calibration, reference, args.seed, power)
    options = planner.plan(schemes, machines)
    if any(option.watts is not None for option in options):
        notes.append(power.said)
    if args.json:
        print(json.dumps(to_dict(shape, demand, options, value_bytes, notes), indent=2))
    else:
        print(render(shape, demand, options, value_bytes, notes), flush=True)
    if not options[0].meets:
        best = options[0]
        wanted = " and ".join(str(objective) for objective in demand.objectives)
        raise PlanError(
            f"no option meets {wanted} at {args.rate}; "
            f"the closest is {best.scheme} on {best.hardware}: {best.closest}"
        )
    return 0


def _demand(args: argparse.Namespace, shape: ModelShape) -> Demand:
    usual = USES[args.use] if args.use else DEFAULT
    prompt, output = args.input or usual.prompt, args.output or usual.output
    context = args.context or min(shape.context, max(8192, prompt + output))
    if prompt + output > context:
        raise DemandError(
            f"--input and --output are {prompt + output:,} tokens together, "
            f"more than the context of {context:,}"
        )
    if context > shape.context:
        raise DemandError(f"--context is {context:,}, {shape.name} has {shape.context:,}")
    objectives = (
        parse_objective("ttft", args.ttft or usual.ttft),
        parse_objective("tpot", args.tpot or usual.tpot),
    )
    return Demand(parse_rate(args.rate), prompt, output, context, objectives)


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
    if any(scheme.experts_compressed for scheme in schemes[1:]):
        notes.append(EXPERTS_ON_CPUS)
    return schemes, notes


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

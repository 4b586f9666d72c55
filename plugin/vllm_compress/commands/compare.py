"""`vllm-compress compare URL_A URL_B --prompts FILE`: is B as good as A?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_compress.operations.abtest.comparison import ComparisonSettings

DESCRIPTION = """\
Send the same prompts to two vLLM servers, A the standard and B the candidate, and compare what
comes back: quality, output, latency, throughput, errors and cost, each with a confidence interval.
Metrics with a margin are judged: B is non-inferior, inferior or undecided."""
EPILOG = """\
prompts: every line of a .txt, or of a .jsonl with `prompt` or chat `messages`, and optionally
`answer` (scored by exact match, or by --scorer) and `max_tokens`.

metrics and default margins (--margin NAME=VALUE or NAME=none, as often as needed):
  perplexity=1.02    of the prompts, B / A at most
  kl=0.05            KL(A || B) on the prompts, nats per token at most; from the --logprobs
                     likeliest tokens of both only bounds are known unless -1, and the upper one
                     has to keep the margin: it takes the other tokens to have lost on average no
                     more log-probability than the one that lost most at their position
  score=0.02         mean task score, at most so much lower; of every --lm-eval task too
  errors=0.05        share of prompts without an answer at the first try, at most so much higher
  empty=0.05         share of answers with neither words nor a tool call, at most so much higher;
                     reasoning is no answer, so one that is cut inside it is empty
  cut                share of answers that max_tokens ended, at most so much higher
  ttft, ttft_p95, tpot, tpot_p95, cost, throughput   B / A, at most (throughput: at least)
  joules             per generated token, B / A at most: what both servers' /metrics say their
                     devices used in 100 s or more, idle time included; not of a shared device
  top1, agreement, exact   share of the same likeliest prompt tokens, of the same output tokens
                     before the first other one, of equal outputs: at least
  length             output tokens B / A: at most, and at least 1 / VALUE

  probes=0.05        share right of all --probes together, at most so much lower
  probes/KIND        of one kind
  probes/decisions   nats by which the right of two choices is the likelier one, B - A

--probes (configs/probes) needs a chat model. Tool calls: the function and its arguments; JSON that
keeps a schema, unconstrained; refusals where they are right, and only there; the language of the
question; Python that parses; lengths; a fact at five depths of a long text; facts from turns
before; the likelier of two choices. Probes that both servers refuse are left out, and counted.
The reports say of each kind what was refused, and why, what was empty or cut, and what A knew and B
did not.

Outputs are greedy. The first two requests to each server do not count, and no request finds its
prefix in a cache. Without --rate one request runs at a time, A and B in turn, which of them first
by chance. With --rate both get every prompt at the same moment: do not run them on one machine.

Scores are of what a user reads, or of the tool calls as JSON where there is no text. A prompt on
which both were cut before they said anything has no score; many empty or cut answers are part of
the verdict's sentence.

Undecided? Append prompts to the file and run the same command: it asks the new ones only. Each such
look at a comparison spends half of the error that is left of 1 - --confidence, so that looking
again does not make a wrong verdict likelier; the intervals of the first are therefore of 97.5%.

Killed, or a server died: the same command continues. On a finished comparison it judges again, so
--margin, --scorer and prices may be changed without asking the servers again.

--metrics FILE has vllm_compress_quality_* of the result, for node_exporter's textfile collector or
a push gateway. Nightly: the timer of deploy/systemd, the CronJob of deploy/kubernetes, whose
PROBES (quality.probes of the chart) are choices, json, refusals, language and turns: about a
hundred short questions. tools needs a server with a tool parser, needle one with a long context.

exit code: 0 non-inferior, 1 inferior or undecided, 2 the comparison could not be made.
VLLM_API_KEY is sent where it is set.

examples:
  vllm-compress compare http://localhost:8000 http://localhost:8001 --prompts chats.jsonl
  vllm-compress compare URL_A URL_B --prompts p.txt --rate 4 --margin ttft=1.1 --margin tpot=1.1
  vllm-compress compare URL_A URL_B --prompts quiz.jsonl --scorer grade.py:grade -o quiz-int4
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("compare", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("urls", metavar="URL", nargs=2, help="of A and of B, such as http://localhost:8000")
    add("--prompts", metavar="FILE", required=True, help=".txt or .jsonl")
    add("-o", "--out", metavar="DIR", default="comparison", help="reports (default: comparison)")
    for side in "ab":
        add(f"--model-{side}", metavar="NAME", help=f"served name at {side.upper()}, if several")
        add(
            f"--price-{side}",
            type=float,
            metavar="PRICE",
            help=f"of {side.upper()} per hour, all devices (default: what its /metrics says)",
        )
    add("--rate", type=float, metavar="R", help="prompts per second (default: one at a time)")
    add(
        "--concurrency",
        type=int,
        default=64,
        metavar="N",
        help="prompts unanswered at most, with --rate (default 64)",
    )
    add("--max-tokens", type=int, default=64, metavar="N", help="to generate (default 64)")
    add(
        "--logprobs",
        type=int,
        default=20,
        metavar="K",
        help="per prompt token, for KL (default 20); 0: neither KL nor perplexity; -1: all, KL is "
        "exact, slow, and the servers need --max-logprobs -1",
    )
    add("--margin", action="append", default=[], metavar="NAME=VALUE", help="see below")
    add("--scorer", metavar="FILE:FUNCTION", help="function(row, output) -> 0 to 1, in a .py file")
    add(
        "--lm-eval",
        metavar="TASKS",
        help="also run these tasks of lm-evaluation-harness, such as gsm8k,hellaswag:200 (200 "
        "questions); needs vllm-compress[lm-eval]",
    )
    add(
        "--probes",
        metavar="KINDS",
        help="also ask questions whose answers a program checks: all, or some of tools, json, "
        "refusals, language, code, length, needle, turns, choices",
    )
    add(
        "--confidence",
        type=float,
        default=0.95,
        metavar="C",
        help="of all looks together (default 0.95)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything drawn (default 0)")
    add("--metrics", metavar="FILE", help="also write the result for Prometheus")
    add("--json", action="store_true", help="print report.json")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    from vllm_compress.operations.abtest.comparison import REPORT_HTML, compare
    from vllm_compress.operations.abtest.report.document import text
    from vllm_compress.operations.abtest.report.exposition import write_exposition
    from vllm_compress.operations.abtest.scoring.judge import NON_INFERIOR

    settings = _settings(args)
    result = compare(settings)
    if args.metrics:
        write_exposition(Path(args.metrics), result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{text(result)}\nreport: {settings.out / REPORT_HTML}")
    return 0 if result["verdict"] == NON_INFERIOR else 1


def _settings(args: argparse.Namespace) -> ComparisonSettings:
    from compress_methods.errors import CompressError
    from vllm_compress.operations.abtest.comparison import ComparisonSettings
    from vllm_compress.operations.abtest.replay.replay import Options

    checks = (
        ("--rate", args.rate, args.rate is None or 0 < args.rate < 1e6, "a number above 0"),
        ("--concurrency", args.concurrency, args.concurrency >= 1, "a number from 1"),
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "a number from 1"),
        ("--logprobs", args.logprobs, args.logprobs >= -1, "a number from 0, or -1"),
        ("--confidence", args.confidence, 0.5 <= args.confidence < 1, "0.5 to below 1"),
        *(
            (f"--price-{s}", p, p is None or 0 < p < 1e9, "a number above 0")
            for s, p in (("a", args.price_a), ("b", args.price_b))
        ),
    )
    for option, value, good, expected in checks:
        if not good:
            raise CompressError(f"{option} is {value}, expected {expected}")
    return ComparisonSettings(
        urls=(args.urls[0], args.urls[1]),
        prompts=Path(args.prompts),
        out=Path(args.out),
        models=(args.model_a, args.model_b),
        prices=(args.price_a, args.price_b),
        max_tokens=args.max_tokens,
        margins=args.margin,
        scorer=args.scorer,
        lm_eval=args.lm_eval,
        probes=args.probes,
        confidence=args.confidence,
        options=Options(args.rate, args.concurrency, args.logprobs, args.seed),
        quiet=args.quiet,
    )

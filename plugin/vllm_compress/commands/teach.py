"""`vllm-compress teach URL --seeds FILE`: training data, written by a served model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_compress.operations.teaching.settings import TeachSettings

DESCRIPTION = """\
Have a served model, the teacher, write training data for a smaller one. The teacher may be any
OpenAI-compatible endpoint; nothing of it is seen but its answers."""
EPILOG = """\
styles:
  icl        each question behind --demonstrations others with their answers, the most similar or
             any; the data has the question alone, unless --keep-demonstrations
  cot        each question --samples times, with steps written down; the final answer that most
             come to is checked against the known one, and wrong ones are left out
  instruct   new instructions grow out of the seeds, none like another, until there are --count;
             then each is answered

seeds: a .jsonl, every line an object with the question in `prompt`, chat `messages`, or
`instruction` and `input`, and the known answer, where there is one, in `answer`, `output` or
`completion`.

data: every line an object with `messages` (with --completions: `prompt` and `completion`), `style`,
`seed` (lines of the seeds it came from), `answer` (the final one), and `logprobs` where the
endpoint gives them: `tokens`, `logprobs`, `top_tokens`, `top_logprobs` by position, `ids` true
where tokens are ids, as vLLM gives them, and not texts.

--check FILE.py:FUNCTION calls function(row, answer) with the seed's line and the final answer; it
is right where True or 1 comes back. Two answers are the same but for spaces, case, a full stop and
marks around them.

Requests that meet 429, a 5xx or no answer are sent again, after what Retry-After says, or ever
later. Killed, or the server died: the same command continues, from FILE.journal beside the data,
and asks nothing twice. On a finished file it filters again without asking, so --check, --keep and
prices may be changed, and --samples and --count raised.

--json prints one object with the keys
  file, style, teacher, lines, lines_with_logprobs
  seeds, seeds_repeated, seeds_held_out   used, and left out
  dropped                       how many of what is not taught, by reason
  retries                       of this run
  answers, tokens_in, tokens_out, cost    of all runs; cost with both prices, else null
  answers_without_counts        whose tokens the endpoint does not tell
  grown, wanted                 with instruct: new instructions, and --count
  refusal                       the last refusal of single requests, if any

VLLM_API_KEY is sent where it is set.

examples:
  vllm-compress teach http://localhost:8000 --seeds quiz.jsonl --style cot -o data.jsonl
  vllm-compress teach URL --seeds quiz.jsonl --style icl --held-out test.jsonl -o data.jsonl
  vllm-compress teach URL --model NAME --seeds tasks.jsonl --style instruct --count 5000 \\
      --parallel 32 --price-in 0.15 --price-out 0.6 -o data.jsonl
"""
OF_STYLES = {
    "demonstrations": ("icl",),
    "select": ("icl",),
    "keep_demonstrations": ("icl",),
    "samples": ("cot",),
    "keep": ("cot",),
    "ask": ("cot",),
    "mark": ("cot",),
    "check": ("icl", "cot"),
    "count": ("instruct",),
}
"""Options that only some styles know."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("teach", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("url", metavar="URL", help="of the teacher, such as http://localhost:8000")
    add("--seeds", metavar="FILE", required=True, help="questions, .jsonl")
    add("--style", choices=("icl", "cot", "instruct"), required=True, help="see below")
    add("-o", "--out", metavar="FILE", required=True, help="the data to write, .jsonl")
    add("--model", metavar="NAME", help="served name, if the endpoint has several")
    add(
        "--completions",
        action="store_true",
        help="ask /v1/completions with plain text, for models that know no chats",
    )
    _add_of_styles(add)
    add("--temperature", type=float, metavar="T", help="default: icl 0, cot 0.7, instruct 1 and 0")
    add("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"ends an answer, \n is a line's end; may be repeated (--completions: an empty line)",
    )
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="per token, for KL (default: 20 where the endpoint gives them); 0: none",
    )
    add("--parallel", type=int, default=8, metavar="N", help="requests at once (default 8)")
    add("--rate", type=float, metavar="R", help="requests per second at most (default: no limit)")
    add("--held-out", metavar="FILE", help="a test set, .jsonl or .txt: what it has is left out")
    add(
        "--overlap",
        type=int,
        default=13,
        metavar="N",
        help="words in a row, or a whole shorter question, that count as the same (default 13)",
    )
    for side, what in (("in", "prompts"), ("out", "answers")):
        add(f"--price-{side}", type=float, metavar="PRICE", help=f"of a million tokens of {what}")
    add("--seed", type=int, default=0, metavar="N", help="of everything drawn here (default 0)")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress on stderr")


def _add_of_styles(add: Any) -> None:
    add("--demonstrations", type=int, metavar="K", help="icl: shown with a question (default 4)")
    add("--select", choices=("similar", "random"), help="icl: which (default similar)")
    add(
        "--keep-demonstrations",
        action="store_true",
        default=None,
        help="icl: keep them in the data",
    )
    add("--samples", type=int, metavar="N", help="cot: answers to each question (default 5)")
    add("--keep", type=int, metavar="N", help="cot: lines per question at most (default 1)")
    add("--ask", metavar="TEXT", help="cot: put behind a question, instead of a request for steps")
    add("--mark", metavar="TEXT", help="cot: what stands before a final answer (default Answer:)")
    add(
        "--check",
        metavar="exact|none|FILE.py:FUNCTION",
        help="icl and cot: when an answer is right (default: cot exact, icl none)",
    )
    add("--count", type=int, metavar="N", help="instruct: instructions to grow (default 100)")


def run(args: argparse.Namespace) -> int:
    from vllm_compress.operations.teaching.run import teach

    result = teach(_settings(args))
    print(json.dumps(result, indent=2) if args.json else render(result))
    return 0


def _settings(args: argparse.Namespace) -> TeachSettings:
    from compress_methods.errors import CompressError
    from vllm_compress.operations.teaching.settings import TeachSettings

    of_style = {name: getattr(args, name) for name in OF_STYLES if getattr(args, name) is not None}
    for name in of_style:
        if args.style not in OF_STYLES[name]:
            styles = " and ".join(OF_STYLES[name])
            raise CompressError(f"{_option(name)} is for {styles}, found --style {args.style}")
    settings = TeachSettings(
        url=args.url,
        seeds=Path(args.seeds),
        style=args.style,
        out=Path(args.out),
        model=args.model,
        completions=args.completions,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        stop=tuple(text.replace(r"\n", "\n") for text in args.stop),
        logprobs=args.logprobs,
        parallel=args.parallel,
        rate=args.rate,
        held_out=None if args.held_out is None else Path(args.held_out),
        overlap=args.overlap,
        price_in=args.price_in,
        price_out=args.price_out,
        seed=args.seed,
        quiet=args.quiet,
        **of_style,
    )
    _check(settings)
    return settings


def _check(settings: TeachSettings) -> None:
    """Raise a `CompressError` for a value that an option cannot have."""
    from compress_methods.errors import CompressError

    from_1 = ("demonstrations", "samples", "keep", "count", "max_tokens", "parallel", "overlap")
    checks = [
        *((name, getattr(settings, name) >= 1, "a number from 1") for name in from_1),
        ("logprobs", settings.logprobs is None or settings.logprobs >= 0, "a number from 0"),
        ("temperature", _within(settings.temperature, 0, 2), "0 to 2"),
        ("rate", settings.rate is None or 0 < settings.rate < 1e6, "a number above 0"),
        ("price_in", _within(settings.price_in, 0, 1e9), "a number from 0"),
        ("price_out", _within(settings.price_out, 0, 1e9), "a number from 0"),
        ("stop", all(settings.stop), "text"),
        ("mark", bool(settings.mark.strip()), "text"),
    ]
    for name, good, expected in checks:
        if not good:
            value = getattr(settings, name)
            raise CompressError(f"{_option(name)} is {value!r}, expected {expected}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _within(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def render(result: dict[str, Any]) -> str:
    """The summary for people."""
    left_out = [
        f"{result[key]:,} seeds {what}"
        for key, what in (("seeds_repeated", "repeated"), ("seeds_held_out", "held out"))
        if result[key]
    ]
    left_out += [f"{count:,} {reason}" for reason, count in result["dropped"].items()]
    least = "at least " if result["answers_without_counts"] else ""
    cost = "" if result["cost"] is None else f", cost {result['cost']:.4f}"
    lines = [
        f"{result['file']}: {result['lines']:,} lines of {result['teacher']}, {result['style']} on "
        f"{result['seeds']:,} seeds; {result['lines_with_logprobs']:,} with log-probabilities",
        f"left out: {', '.join(left_out) or 'nothing'}",
        f"{result['answers']:,} answers, {least}{result['tokens_in']:,} tokens in, "
        f"{result['tokens_out']:,} out{cost}; {result['retries']:,} retries",
    ]
    if result.get("grown", 0) < result.get("wanted", 0):
        lines.append(
            f"grew {result['grown']:,} of {result['wanted']:,} instructions; then nothing new came "
            "any more"
        )
    if "refusal" in result:
        lines.append(f"the last refusal: {result['refusal']}")
    return "\n".join(lines)

"""`vllm-compress eval DIR --against BASE --text FILE`: what compression lost, on the user's text.

Without `--url` both models are loaded here with transformers, so they have to fit in memory
together, unpacked. With it the compressed one is asked over HTTP and only the original is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress_methods.evaluate import Evaluation

DESCRIPTION = """\
Compare a compressed model with its original on a text: perplexity of both, KL divergence to the
original, and how often both find the same next token likeliest."""
EPILOG = """\
--json prints one object with the keys
  perplexity, base_perplexity   of the text under the compressed and the original model
  kl                            mean KL(original || compressed), nats per predicted token
  kl_kind                       "exact", or "lower_bound" where --url gave only some tokens
  top1_agreement                share of positions where the likeliest token is the same, 0 to 1
  tokens                        predicted tokens the means are over
A value that is not finite is null.

examples:
  vllm-compress eval out/int4 --against path/to/model --text novel.txt --tokens 20000
  vllm-compress eval out/int4 --against path/to/model --text chats.jsonl --url http://localhost:8000
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="compressed model, or any other to compare")
    parser.add_argument("--against", metavar="BASE", required=True, help="the original model")
    parser.add_argument(
        "--text",
        metavar="FILE",
        required=True,
        help=".txt, .jsonl or .parquet; the latter two with a column `text` or `messages`",
    )
    parser.add_argument(
        "--url", metavar="URL", help="a vLLM server of DIR to ask instead of loading DIR"
    )
    parser.add_argument(
        "--model",
        dest="served",
        metavar="NAME",
        help="served name at --url; found by DIR if left out",
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        default=20,
        metavar="K",
        help="log-probabilities per token to ask of --url (default 20); -1 is all: KL is exact, "
        "the server needs --max-logprobs -1, and a few hundred --tokens take minutes",
    )
    parser.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="use the text's first N tokens only"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    from compress_methods.errors import CalibrationError

    for option, value, least in (("--length", args.length, 2), ("--tokens", args.tokens, 2)):
        if value is not None and value < least:
            raise CalibrationError(f"{option} is {value}, expected a number from {least}")
    if args.logprobs < 1 and args.logprobs != -1:
        raise CalibrationError(f"--logprobs is {args.logprobs}, expected a number from 1, or -1")
    result = _measure(args)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print(render(result))
    return 0


def _measure(args: argparse.Namespace) -> Evaluation:
    from compress_methods.evaluate import evaluate
    from compress_methods.evaluate_served import evaluate_url
    from compress_methods.progress import Progress

    with Progress(1, "evaluating", sys.stderr, quiet=args.quiet) as progress:
        if args.url is None:
            return evaluate(
                args.model,
                args.against,
                args.text,
                length=args.length,
                limit_tokens=args.tokens,
                progress=progress,
            )
        return evaluate_url(
            args.url,
            args.against,
            args.text,
            model=args.served or args.model,
            length=args.length,
            limit_tokens=args.tokens,
            logprobs=args.logprobs,
            progress=progress,
        )


def render(result: Evaluation) -> str:
    """The table for people."""
    change = result.perplexity / result.base_perplexity - 1
    bound = "at least " if result.kl_kind == "lower_bound" else ""
    return "\n".join(
        [
            f"perplexity            {result.perplexity:.3f} ({change:+.2%}; "
            f"original {result.base_perplexity:.3f})",
            f"KL to the original    {bound}{result.kl:.5f} nats/token",
            f"same likeliest token  {result.top1_agreement:.2%}",
            f"predicted tokens      {result.tokens:,}",
        ]
    )

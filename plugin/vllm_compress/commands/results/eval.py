"""`vllm-compress eval DIR --against BASE`: what compression lost, on the user's text and questions.

Without `--url` both models are loaded here with transformers for `--text`, so they have to fit in
memory together, unpacked. With it the compressed one is asked over HTTP and only the original is
loaded. `--tasks` of questions reads one block at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_compress.commands.convert import add_device_argument

if TYPE_CHECKING:
    from compress_methods.evaluation.metrics import Evaluation
    from compress_methods.evaluation.outputs.judge import Outcome
    from compress_methods.evaluation.outputs.pairs import PairEvaluation
    from compress_methods.evaluation.tasks import TaskResult

DESCRIPTION = """\
Compare a compressed model with its original. On a text: perplexity of both, KL divergence to the
original, how often both find the same next token likeliest, what it would be worth as a draft, and
how much of the original's decisions is left; of a masked language model the same where tokens are
hidden. Without a language model's head: the cosine of embeddings, or KL and agreement of labels. On
questions: how many both answer rightly. On pairs of texts: whether both order them alike."""
EPILOG = """\
--json prints one object with the keys
  perplexity, base_perplexity   of the text under the compressed and the original model
  perplexity_increase           perplexity / base_perplexity - 1
  kl                            mean KL(original || compressed), nats per predicted token
  kl_kind                       "exact", or "lower_bound" where --url gave only some tokens
  kl_most                       then kl is the least it is, and this the most, if the tokens that
                                were not given lost on average no more of their log-probability
                                than the one that lost most among those given at their position
  top1_agreement                share of positions where the likeliest token is the same, 0 to 1
  acceptance                    1 - total variation: share of tokens accepted if the compressed
                                model drafts for the original; a lower bound where KL is one
  margin_ratio                  median over positions of the log-odds between the two tokens the
                                original finds likeliest, compressed / original: 1 is unchanged, 0
                                a toss of a coin; null where KL is a lower bound
  tokens, sequences             predicted tokens the means are over, windows they lie in
  intervals                     95% confidence interval [low, high] of every one by its name, each
                                window being one observation
  tasks                         with --tasks, for each metric of each: task, metric, base_score,
                                score, change and its 95% interval by question, questions
Of an encoder, instead: cosine (mean over texts) and cosine_p05 (what 95% of them reach); of a
classifier: kl, top1_agreement and decisions. Both have sequences and intervals.
  pairs                         with --pairs: rank_correlation, Spearman's rho between both models'
                                scores; base_spearman and spearman, of each with people's; pairs
A value that is not finite is null.

--pairs takes a .jsonl with a pair a line, the score (people's, on any scale) in all or none:
  {"sentence1": "A man sleeps.", "sentence2": "Someone is asleep.", "score": 4.5}

--tasks takes files. A .jsonl has a question a line, answered by log-likelihood (acc):
  {"prompt": "Q: 2 + 2 is\\nA:", "choices": ["3", "4"], "answer": 1}
A .yaml is a task of lm-evaluation-harness with data of your own (dataset_path: json); it needs
vllm-compress[lm-eval].

examples:
  vllm-compress eval out/int4 --against path/to/model --text novel.txt --tokens 20000
  vllm-compress eval out/int4 --against path/to/model --text chats.jsonl --url http://localhost:8000
  vllm-compress eval out/int4 --against path/to/model --tasks questions.jsonl,mine.yaml
  vllm-compress eval out/int4 --against path/to/model --text novel.txt --kv-cache fp8
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="compressed model, or any other to compare")
    parser.add_argument("--against", metavar="BASE", required=True, help="the original model")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help=".txt, .jsonl or .parquet; the latter two with a column `text` or `messages`",
    )
    parser.add_argument(
        "--tasks", metavar="FILE,...", help="questions to ask both, .jsonl or the harness's .yaml"
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="pairs of texts, .jsonl, that embeddings or a reranker are to put in the same order",
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
    parser.add_argument(
        "--kv-cache",
        choices=("auto", "fp8", "fp8-cpu"),
        default="auto",
        help="round keys and values of DIR as vLLM's --kv-cache-dtype fp8 does, by its scales: fp8 "
        "as on GPUs, fp8-cpu as its kernel for CPUs, which cuts towards zero",
    )
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    from compress_methods.errors import CalibrationError
    from compress_methods.evaluation.tasks import require_task

    for option, value, least in (("--length", args.length, 2), ("--tokens", args.tokens, 2)):
        if value is not None and value < least:
            raise CalibrationError(f"{option} is {value}, expected a number from {least}")
    if args.logprobs < 1 and args.logprobs != -1:
        raise CalibrationError(f"--logprobs is {args.logprobs}, expected a number from 1, or -1")
    if args.text is None and args.tasks is None and args.pairs is None:
        raise CalibrationError("expected --text FILE, --tasks FILE, --pairs FILE or several")
    if args.kv_cache != "auto" and (args.url is not None or args.text is None):
        raise CalibrationError(
            f"--kv-cache {args.kv_cache} is of --text without --url; "
            "a server has its own --kv-cache-dtype"
        )
    if args.pairs is not None and args.url is not None:
        raise CalibrationError("--pairs loads DIR; leave out --url")
    if args.tasks is not None and args.url is not None:
        raise CalibrationError(
            "--tasks loads DIR; leave out --url (compare --lm-eval asks servers)"
        )
    files = [Path(name.strip()) for name in args.tasks.split(",")] if args.tasks else []
    for file in files:
        require_task(file)
    result = None if args.text is None else _measure(args)
    tasks = [found for file in files for found in _ask(args, file)]
    pairs = None if args.pairs is None else _pairs(args)
    if args.json:
        block = {} if result is None else result.to_dict()
        if files:
            block["tasks"] = [found.to_dict() for found in tasks]
        if pairs is not None:
            block["pairs"] = pairs.to_dict()
        print(json.dumps(block, indent=2))
    else:
        lines = [] if result is None else [render(result)]
        lines += map(_line, tasks)
        print("\n".join([*lines, *([] if pairs is None else _pair_lines(pairs))]))
    return 0


def _pairs(args: argparse.Namespace) -> PairEvaluation:
    """How both models order the pairs of a file."""
    from compress_methods.evaluation.outputs.pairs import evaluate_pairs
    from compress_methods.system.progress import Progress

    with Progress(1, "pairs", sys.stderr, quiet=args.quiet) as progress:
        return evaluate_pairs(
            args.model, args.against, args.pairs, device=args.device, progress=progress
        )


def _pair_lines(found: PairEvaluation) -> list[str]:
    ends = _ends(found, "rank_correlation", ".4f")
    lines = [f"order of pairs        {found.rank_correlation:.4f}{ends}, Spearman's rho"]
    if found.spearman is not None and found.base_spearman is not None:
        ends = _ends(found, "spearman", ".4f")
        lines.append(
            f"order by people       {found.spearman:.4f}{ends}; original {found.base_spearman:.4f}"
        )
    return [*lines, f"pairs                 {found.pairs:,}"]


def _ask(args: argparse.Namespace, file: Path) -> list[TaskResult]:
    """Both models' answers to the questions of a file."""
    from compress_methods.evaluation.tasks import compare, score
    from compress_methods.model.device import resolve_device
    from compress_methods.system.progress import Progress

    device, base = resolve_device(args.device), Path(args.against)
    scores = []
    for model in (base, Path(args.model)):
        with Progress(1, f"{model.name}, {file.name}", sys.stderr, quiet=args.quiet) as progress:
            scores.append(score(file, model, base, device, progress=progress))
    return compare(file, *scores)


def _line(found: TaskResult) -> str:
    change = found.change
    return (
        f"{found.task} {found.metric}: {found.score:.1%} (original {found.base:.1%}), change "
        f"{change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%}), {change.n:,} questions"
    )


def _measure(args: argparse.Namespace) -> Outcome:
    from compress_methods.evaluation.offline import evaluate
    from compress_methods.evaluation.served import evaluate_url
    from compress_methods.system.progress import Progress

    with Progress(1, "evaluating", sys.stderr, quiet=args.quiet) as progress:
        if args.url is None:
            return evaluate(
                args.model,
                args.against,
                args.text,
                length=args.length,
                limit_tokens=args.tokens,
                progress=progress,
                device=args.device,
                kv_cache=None if args.kv_cache == "auto" else args.kv_cache,
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
            device=args.device,
        )


def render(result: Outcome) -> str:
    """The table for people."""
    from compress_methods.evaluation.outputs.classes import ClassEvaluation
    from compress_methods.evaluation.outputs.embeddings import EmbeddingEvaluation

    if isinstance(result, EmbeddingEvaluation):
        ends = _ends(result, "cosine", ".5f")
        return (
            f"cosine of embeddings  {result.cosine:.5f}{ends}, of 95% of the texts "
            f"{result.cosine_p05:.5f} or more\n"
            f"texts                 {result.sequences:,}; in brackets 95% intervals by text"
        )
    if isinstance(result, ClassEvaluation):
        return (
            f"KL of the labels      {result.kl:.5f} nats{_ends(result, 'kl', '.5f')}\n"
            f"same label            {result.top1_agreement:.2%}"
            f"{_ends(result, 'top1_agreement', '.2%')}\n"
            f"decisions             {result.decisions:,} in {result.sequences:,} texts; "
            "in brackets 95% intervals by text"
        )
    return _tokens(result)


def _tokens(result: Evaluation) -> str:
    kl = f"{result.kl:.5f} nats/token{_ends(result, 'kl', '.5f')}"
    least = ""
    if result.kl_kind == "lower_bound":
        kl = f"{result.kl:.5f} to {result.kl_most:.5f} nats/token (exact with --logprobs -1)"
        least = "at least "
    lines = [
        f"perplexity            {result.perplexity:.3f} ({result.perplexity_increase:+.2%}"
        f"{_ends(result, 'perplexity_increase', '+.2%')}; original {result.base_perplexity:.3f})",
        f"KL to the original    {kl}",
        f"same likeliest token  {result.top1_agreement:.2%}"
        f"{_ends(result, 'top1_agreement', '.2%')}",
        f"accepted as a draft   {least}{result.acceptance:.2%}{_ends(result, 'acceptance', '.2%')}",
    ]
    if result.margin_ratio is not None:
        ends = _ends(result, "margin_ratio", ".3f")
        lines.append(f"margin of decisions   {result.margin_ratio:.3f}{ends}, median")
    lines.append(
        f"predicted tokens      {result.tokens:,} in {result.sequences:,} windows; "
        "in brackets 95% intervals by window"
    )
    return "\n".join(lines)


def _ends(result: Outcome | PairEvaluation, name: str, style: str) -> str:
    """Both ends of an interval, if there is one."""
    low, high = (result.intervals or {}).get(name, (math.nan, math.nan))
    known = math.isfinite(low) and math.isfinite(high)
    return f" ({low:{style}} to {high:{style}})" if known else ""

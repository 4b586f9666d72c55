"""From journaled answers and log-probabilities to one row per metric.

A pair counts for a metric where both sides have what it needs: answers of both, for times at the
first try, more than one token of both for tpot. An error is a first try without an answer.
Where both answers were cut before anything was said, as inside their reasoning, a score of 0 = 0
would say that they are alike; such a pair has none. Where one of them was, it has failed.
Perplexity, kl and top1 weigh prompts by their tokens, agreement counts every prompt alike.

Throughput is output tokens per second in which the server had something to do. Where several
requests overlap, each gets an equal share of that time, so the shares of all add up to the time
the server was busy. One at a time it is the speed of one request; only a replay with --rate says
what the server can do, and only near its limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress_methods.evaluation.statistics import (
    Array,
    Estimate,
    bounded_difference,
    bounded_mean,
    exp_mean_per,
    mean_between,
    mean_log_ratio,
    mean_per,
    quantile_ratio,
    ratio_of_rates,
)
from vllm_compress.operations.abtest.replay.client import Answer, Server
from vllm_compress.operations.abtest.replay.prompts import Prompt
from vllm_compress.operations.abtest.replay.replay import ANSWERS, SCORES, Options
from vllm_compress.operations.abtest.scoring.logprobs import Score
from vllm_compress.operations.abtest.scoring.scores import Scorer, apply_scorer, exact_match

SECONDS_PER_HOUR = 3600.0
MILLION = 1e6
TAIL = 0.95
LEAST_BEYOND = 5
EXACT = "exact"


@dataclass(frozen=True)
class Measurement:
    """What was seen of one metric: the values of A and of B where they have one each, and the
    estimate of the change, None where no pair could be made."""

    name: str
    values: tuple[float, float] | None
    estimate: Estimate | None
    note: str = ""


@dataclass(frozen=True)
class PairOfAnswers:
    """One prompt and both answers to it; `scores` are those of a task, None without one, and say
    nothing where `unscored`."""

    index: int
    prompt: Prompt
    a: Answer
    b: Answer
    logprobs: Score | None
    scores: tuple[float, float] | None
    unscored: bool = False

    @property
    def answered(self) -> bool:
        return not (self.a.error or self.b.error)

    @property
    def unsaid(self) -> bool:
        """Whether both were cut before they said anything."""
        return all(answer.empty and answer.cut for answer in (self.a, self.b))

    @property
    def same_tokens(self) -> int:
        """Output tokens before the first that differs."""
        both = zip(self.a.tokens, self.b.tokens, strict=False)
        return next((i for i, (x, y) in enumerate(both) if x != y), min(self.lengths))

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.a.tokens), len(self.b.tokens)


def read_pairs(
    prompts: list[Prompt], records: Mapping[str, Mapping[str, Any]], scorer: Scorer | None
) -> list[PairOfAnswers]:
    """All pairs in the order of time; raises `ScorerError`."""
    pairs = []
    for i, prompt in enumerate(prompts):
        line = records[ANSWERS][str(i)]
        a, b = Answer.from_dict(line["a"]), Answer.from_dict(line["b"])
        found = records.get(SCORES, {}).get(str(i))
        logprobs = Score(**found["score"]) if found and found["score"] else None
        scores = None
        task = scorer or (exact_match if "answer" in prompt.row else None)
        pair = PairOfAnswers(i, prompt, a, b, logprobs, None)
        if task is not None and pair.answered:
            one, other = (apply_scorer(task, prompt.row, x.output, prompt.where) for x in (a, b))
            scores = one, other
        pairs.append(replace(pair, scores=scores, unscored=scores is not None and pair.unsaid))
    return sorted(pairs, key=lambda pair: pair.a.started or pair.b.started)


def measure_metrics(
    pairs: list[PairOfAnswers], servers: tuple[Server, Server], options: Options, confidence: float
) -> list[Measurement]:
    """Every metric there is something to say about, in the order of the report."""
    answered = [pair for pair in pairs if pair.answered]
    at_once = [pair for pair in answered if not (pair.a.problem or pair.b.problem)]
    scored = [pair.logprobs for pair in answered if pair.logprobs]
    seed = options.seed
    return [
        *(_likelihood(scored, confidence, options.logprobs == -1) if options.logprobs else []),
        *_outputs(answered, confidence),
        *_scores(answered, confidence),
        _errors(pairs, confidence),
        *_endings(answered, confidence),
        *_latency("ttft", [(p.a.ttft, p.b.ttft) for p in at_once], confidence, seed),
        *_latency("tpot", [(p.a.tpot, p.b.tpot) for p in at_once], confidence, seed),
        *_throughput(at_once, servers, confidence),
    ]


def _likelihood(scores: list[Score], confidence: float, whole: bool) -> list[Measurement]:
    if not scores:
        return [Measurement("perplexity", None, None), Measurement("kl", None, None)]
    tokens = [score.tokens for score in scores]
    worse = [score.nll_b - score.nll_a for score in scores]
    a, b = (
        math.exp(sum(nll) / sum(tokens))
        for nll in ([score.nll_a for score in scores], [score.nll_b for score in scores])
    )
    same = [score.top1 / score.tokens for score in scores]
    kl = [score.kl for score in scores]
    change, note = mean_per(kl, tokens, confidence), EXACT
    if not whole:
        change = mean_between(kl, [score.kl_most for score in scores], tokens, confidence)
        note = f"between {change.value:.3g} and {change.most:.3g}; exact with --logprobs -1"
    return [
        Measurement("perplexity", (a, b), exp_mean_per(worse, tokens, confidence)),
        Measurement("kl", None, change, note),
        Measurement("top1", None, bounded_mean(same, confidence, tokens)),
    ]


def _outputs(pairs: list[PairOfAnswers], confidence: float) -> list[Measurement]:
    if not pairs:
        return []
    same = [pair.same_tokens / max(pair.lengths) for pair in pairs]
    exact = [float(pair.a.tokens == pair.b.tokens) for pair in pairs]
    a, b = ([float(pair.lengths[side]) for pair in pairs] for side in (0, 1))
    one = np.ones(len(pairs))
    return [
        Measurement("agreement", None, bounded_mean(same, confidence)),
        Measurement("exact", None, bounded_mean(exact, confidence)),
        Measurement("length", (_mean(a), _mean(b)), ratio_of_rates((a, one), (b, one), confidence)),
    ]


def _scores(pairs: list[PairOfAnswers], confidence: float) -> list[Measurement]:
    tasks = [pair for pair in pairs if pair.scores]
    found = [pair.scores for pair in tasks if pair.scores and not pair.unscored]
    left_out = len(tasks) - len(found)
    note = f"{left_out} left out, cut before anything was said" if left_out else ""
    if not found:
        return [Measurement("score", None, None, note)] if tasks else []
    a, b = ([pair[side] for pair in found] for side in (0, 1))
    change = bounded_difference(a, b, confidence)
    return [Measurement("score", (_mean(a), _mean(b)), change, note)]


def _endings(pairs: list[PairOfAnswers], confidence: float) -> list[Measurement]:
    """Answers with nothing in them, and answers that the number of tokens ended."""
    rows = []
    for name in ("empty", "cut") if pairs else ():
        a, b = ([float(getattr(getattr(p, side), name)) for p in pairs] for side in "ab")
        change = bounded_difference(a, b, confidence)
        rows.append(Measurement(name, (_mean(a), _mean(b)), change))
    return rows


def _errors(pairs: list[PairOfAnswers], confidence: float) -> Measurement:
    a, b = ([float(bool(getattr(p, side).problem)) for p in pairs] for side in "ab")
    change = bounded_difference(a, b, confidence)
    return Measurement("errors", (_mean(a), _mean(b)), change)


def _latency(
    name: str, times: list[tuple[float | None, float | None]], confidence: float, seed: int
) -> list[Measurement]:
    """The typical change, of all prompts alike, and that of the slowest."""
    both = [(x, y) for x, y in times if x and y]
    if not both:
        return [Measurement(name, None, None)]
    a, b = (np.array(side) for side in zip(*both, strict=True))
    typical = mean_log_ratio(a, b, confidence, serial=True)
    rows = [Measurement(name, (float(np.median(a)), float(np.median(b))), typical)]
    slowest = float(np.quantile(a, TAIL)), float(np.quantile(b, TAIL))
    if (1 - TAIL) * len(both) < LEAST_BEYOND:
        note = f"needs {math.ceil(LEAST_BEYOND / (1 - TAIL))} pairs"
        return [*rows, Measurement(f"{name}_p95", slowest, None, note)]
    tail = quantile_ratio(a, b, TAIL, confidence, seed)
    return [*rows, Measurement(f"{name}_p95", slowest, tail)]


def _throughput(
    pairs: list[PairOfAnswers], servers: tuple[Server, Server], confidence: float
) -> list[Measurement]:
    """Tokens per second, and what a million of them cost where both have a price."""
    if not pairs:
        return []
    a, b = _work([pair.a for pair in pairs]), _work([pair.b for pair in pairs])
    change = ratio_of_rates(a, b, confidence, serial=True)
    rows = [Measurement("throughput", (_rate(a), _rate(b)), change)]
    if servers[0].price_per_hour and servers[1].price_per_hour:
        cost_a = a[1] * (servers[0].price_per_hour * MILLION / SECONDS_PER_HOUR), a[0]
        cost_b = b[1] * (servers[1].price_per_hour * MILLION / SECONDS_PER_HOUR), b[0]
        change = ratio_of_rates(cost_a, cost_b, confidence, serial=True)
        rows.append(Measurement("cost", (_rate(cost_a), _rate(cost_b)), change))
    return rows


def _work(answers: list[Answer]) -> tuple[Array, Array]:
    """Output tokens and busy seconds of every answer."""
    tokens = np.array([len(answer.tokens) for answer in answers], dtype=float)
    starts = np.array([answer.started for answer in answers])
    seconds = np.array([answer.seconds for answer in answers])
    return tokens, busy_shares(starts, starts + seconds)


def _rate(parts: tuple[Array, Array]) -> float:
    return float(parts[0].sum() / parts[1].sum())


def busy_shares(starts: Array, ends: Array) -> Array:
    """Seconds of a server's busy time that each request took up, k at once taking 1/k each."""
    times = np.unique(np.concatenate([starts, ends]))
    begun = np.searchsorted(np.sort(starts), times[:-1], "right")
    over = np.searchsorted(np.sort(ends), times[:-1], "right")
    running = begun - over
    steps = np.where(running > 0, np.diff(times) / np.maximum(running, 1), 0.0)
    used = np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(used[np.searchsorted(times, ends)] - used[np.searchsorted(times, starts)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

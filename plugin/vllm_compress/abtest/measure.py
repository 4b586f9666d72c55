"""From journaled answers and log-probabilities to one row per metric.

A pair counts for a metric where both sides have what it needs: answers of both for times, more
than one token of both for tpot. Perplexity, kl and top1 weigh
prompts by their tokens, agreement counts every prompt alike.

Throughput is output tokens per second in which the server had something to do. Where several
requests overlap, each gets an equal share of that time, so the shares of all add up to the time
the server was busy. One at a time it is the speed of one request; only a replay with --rate says
what the server can do, and only near its limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_compress.abtest import statistics as st
from vllm_compress.abtest.client import Answer, Server
from vllm_compress.abtest.logprobs import Score
from vllm_compress.abtest.prompts import Prompt
from vllm_compress.abtest.replay import ANSWERS, SCORES, Options
from vllm_compress.abtest.scores import Scorer, apply_scorer, exact_match
from vllm_compress.abtest.statistics import Estimate

SECONDS_PER_HOUR = 3600.0
MILLION = 1e6
TAIL = 0.95
LEAST_BEYOND = 5


@dataclass(frozen=True)
class Measured:
    """What was seen of one metric: the values of A and of B where they have one each, and the
    estimate of the change, None where no pair could be made."""

    name: str
    values: tuple[float, float] | None
    estimate: Estimate | None
    note: str = ""


@dataclass(frozen=True)
class PairOfAnswers:
    """One prompt and both answers to it; `scores` are those of a task, None without one."""

    index: int
    prompt: Prompt
    a: Answer
    b: Answer
    logprobs: Score | None
    scores: tuple[float, float] | None

    @property
    def answered(self) -> bool:
        return not (self.a.error or self.b.error)

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
        logprobs = Score.from_dict(found["score"]) if found and found["score"] else None
        scores = None
        task = scorer or (exact_match if "answer" in prompt.row else None)
        if task is not None and not (a.error or b.error):
            one, other = (apply_scorer(task, prompt.row, x.text, prompt.where) for x in (a, b))
            scores = one, other
        pairs.append(PairOfAnswers(i, prompt, a, b, logprobs, scores))
    return sorted(pairs, key=lambda pair: pair.a.started or pair.b.started)


def measure(
    pairs: list[PairOfAnswers], servers: tuple[Server, Server], options: Options, confidence: float
) -> list[Measured]:
    """Every metric there is something to say about, in the order of the report."""
    answered = [pair for pair in pairs if pair.answered]
    scored = [pair.logprobs for pair in answered if pair.logprobs]
    seed = options.seed
    return [
        *(_likelihood(scored, confidence) if options.logprobs else []),
        *_outputs(answered, confidence),
        *_scores([pair.scores for pair in answered if pair.scores], confidence),
        _errors(pairs, confidence),
        *_latency("ttft", [(p.a.ttft, p.b.ttft) for p in answered], confidence, seed),
        *_latency("tpot", [(p.a.tpot, p.b.tpot) for p in answered], confidence, seed),
        *_throughput(answered, servers, confidence),
    ]


def _likelihood(scores: list[Score], confidence: float) -> list[Measured]:
    if not scores:
        return [Measured("perplexity", None, None), Measured("kl", None, None)]
    tokens = [score.tokens for score in scores]
    worse = [score.nll_b - score.nll_a for score in scores]
    a, b = (
        math.exp(sum(nll) / sum(tokens))
        for nll in ([score.nll_a for score in scores], [score.nll_b for score in scores])
    )
    same = [score.top1 / score.tokens for score in scores]
    kl = [score.kl for score in scores]
    return [
        Measured("perplexity", (a, b), st.exp_mean_per(worse, tokens, confidence)),
        Measured("kl", None, st.mean_per(kl, tokens, confidence)),
        Measured("top1", None, st.bounded_mean(same, confidence, tokens)),
    ]


def _outputs(pairs: list[PairOfAnswers], confidence: float) -> list[Measured]:
    if not pairs:
        return []
    same = [pair.same_tokens / max(pair.lengths) for pair in pairs]
    exact = [float(pair.a.tokens == pair.b.tokens) for pair in pairs]
    a, b = ([float(pair.lengths[side]) for pair in pairs] for side in (0, 1))
    one = np.ones(len(pairs))
    return [
        Measured("agreement", None, st.bounded_mean(same, confidence)),
        Measured("exact", None, st.bounded_mean(exact, confidence)),
        Measured("length", (_mean(a), _mean(b)), st.ratio_of_rates((a, one), (b, one), confidence)),
    ]


def _scores(scores: list[tuple[float, float]], confidence: float) -> list[Measured]:
    if not scores:
        return []
    a, b = ([pair[side] for pair in scores] for side in (0, 1))
    return [Measured("score", (_mean(a), _mean(b)), st.bounded_difference(a, b, confidence))]


def _errors(pairs: list[PairOfAnswers], confidence: float) -> Measured:
    a, b = [float(bool(p.a.error)) for p in pairs], [float(bool(p.b.error)) for p in pairs]
    change = st.bounded_difference(a, b, confidence)
    return Measured("errors", (_mean(a), _mean(b)), change)


def _latency(
    name: str, times: list[tuple[float | None, float | None]], confidence: float, seed: int
) -> list[Measured]:
    """The typical change, of all prompts alike, and that of the slowest."""
    both = [(x, y) for x, y in times if x and y]
    if not both:
        return [Measured(name, None, None)]
    a, b = (np.array(side) for side in zip(*both, strict=True))
    typical = st.mean_log_ratio(a, b, confidence, serial=True)
    rows = [Measured(name, (float(np.median(a)), float(np.median(b))), typical)]
    slowest = float(np.quantile(a, TAIL)), float(np.quantile(b, TAIL))
    if (1 - TAIL) * len(both) < LEAST_BEYOND:
        note = f"needs {math.ceil(LEAST_BEYOND / (1 - TAIL))} pairs"
        return [*rows, Measured(f"{name}_p95", slowest, None, note)]
    tail = st.quantile_ratio(a, b, TAIL, confidence, seed)
    return [*rows, Measured(f"{name}_p95", slowest, tail)]


def _throughput(
    pairs: list[PairOfAnswers], servers: tuple[Server, Server], confidence: float
) -> list[Measured]:
    """Tokens per second, and what a million of them cost where both have a price."""
    if not pairs:
        return []
    a, b = _work([pair.a for pair in pairs]), _work([pair.b for pair in pairs])
    rows = [
        Measured(
            "throughput",
            (_rate(a), _rate(b)),
            st.ratio_of_rates(a, b, confidence, serial=True),
        )
    ]
    if servers[0].price_per_hour and servers[1].price_per_hour:
        cost_a = a[1] * (servers[0].price_per_hour * MILLION / SECONDS_PER_HOUR), a[0]
        cost_b = b[1] * (servers[1].price_per_hour * MILLION / SECONDS_PER_HOUR), b[0]
        change = st.ratio_of_rates(cost_a, cost_b, confidence, serial=True)
        rows.append(Measured("cost", (_rate(cost_a), _rate(cost_b)), change))
    return rows


def _work(answers: list[Answer]) -> tuple[st.Array, st.Array]:
    """Output tokens and busy seconds of every answer."""
    tokens = np.array([len(answer.tokens) for answer in answers], dtype=float)
    starts = np.array([answer.started for answer in answers])
    seconds = np.array([answer.seconds for answer in answers])
    return tokens, busy_shares(starts, starts + seconds)


def _rate(parts: tuple[st.Array, st.Array]) -> float:
    return float(parts[0].sum() / parts[1].sum())


def busy_shares(starts: st.Array, ends: st.Array) -> st.Array:
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

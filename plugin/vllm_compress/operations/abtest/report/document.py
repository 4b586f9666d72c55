"""The result of a comparison as one dictionary (report.json), and as text for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_compress.operations.abtest.metrics import find_metric, limit_of
from vllm_compress.operations.abtest.probes.summary import told
from vllm_compress.operations.abtest.replay.client import Server
from vllm_compress.operations.abtest.replay.measure import EXACT, Measurement, PairOfAnswers
from vllm_compress.operations.abtest.replay.replay import Options
from vllm_compress.operations.abtest.scoring.judge import Judgement, Limit, judge, overall

VERSION = 1
WORST = 8
SHOWN = 2000
REASONS = 3
MANY = 0.1
OTHER_QUESTIONS = ("tasks", "probes")
"""Groups that more prompts do not help."""


@dataclass(frozen=True)
class Comparison:
    """All there is to report. `limits` are those of judged metrics, by name; `confidence` is of the
    intervals of this look, `next_confidence` of those of the next one."""

    servers: tuple[Server, Server]
    pairs: list[PairOfAnswers]
    measured: list[Measurement]
    limits: Mapping[str, Limit]
    options: Options
    confidence: float
    prompts: str
    late: int
    look: int = 1
    next_confidence: float = 0.9875
    probes: Sequence[Mapping[str, Any]] = ()


def build(comparison: Comparison) -> dict[str, Any]:
    """Build what report.json holds; keys as in `vllm-compress compare --help`."""
    rows, judgements = [], []
    for measured in comparison.measured:
        limit = limit_of(measured.name, comparison.limits)
        judgement = None
        if limit is not None:
            judgement = judge(measured.estimate, limit, comparison.next_confidence)
            if find_metric(measured.name).group in OTHER_QUESTIONS:
                judgement = replace(judgement, needed=None)
            judgements.append(judgement)
        rows.append(_row(measured, limit, judgement))
    total = overall(judgements)
    pairs = comparison.pairs
    return {
        "version": VERSION,
        "verdict": total.verdict,
        "needed": total.needed,
        "more_prompts": _more(total, len(pairs)),
        "n": len(pairs),
        "confidence": comparison.confidence,
        "look": comparison.look,
        "prompts": comparison.prompts,
        "rate": comparison.options.rate,
        "logprobs": comparison.options.logprobs,
        "seed": comparison.options.seed,
        "late": comparison.late,
        "retries": {side: sum(getattr(p, side).tries - 1 for p in pairs) for side in "ab"},
        "refusals": {side: _refusals(pairs, side) for side in "ab"},
        "warnings": _warnings(pairs),
        "a": _server(comparison.servers[0]),
        "b": _server(comparison.servers[1]),
        "metrics": rows,
        "probes": list(comparison.probes),
        "worst": [_example(pair) for pair in worst(pairs)],
    }


def _row(measured: Measurement, limit: Limit | None, judgement: Judgement | None) -> dict[str, Any]:
    metric, estimate = find_metric(measured.name), measured.estimate
    a, b = measured.values or (None, None)
    return {
        "metric": metric.name,
        "text": metric.text,
        "group": metric.group,
        "unit": metric.unit,
        "change": metric.change,
        "a": finite(a),
        "b": finite(b),
        "value": finite(estimate.value) if estimate else None,
        "most": finite(estimate.most) if estimate else None,
        "low": finite(estimate.low) if estimate else None,
        "high": finite(estimate.high) if estimate else None,
        "n": estimate.n if estimate else 0,
        "limit": limit.value if limit else None,
        "worse": metric.bad,
        "verdict": judgement.verdict if judgement else None,
        "needed": judgement.needed if judgement else None,
        "note": measured.note,
    }


def _server(server: Server) -> dict[str, Any]:
    return {
        "url": server.url,
        "model": server.model,
        "info": server.info,
        "price_per_hour": server.price_per_hour,
    }


def _refusals(pairs: Sequence[PairOfAnswers], side: str) -> dict[str, int]:
    """The most frequent reasons for no answer at the first try, and how often each was given."""
    reasons = Counter(why for pair in pairs if (why := getattr(pair, side).problem))
    return dict(reasons.most_common(REASONS))


def _warnings(pairs: Sequence[PairOfAnswers]) -> list[str]:
    """What makes a verdict say less than it seems to: that many answers are none."""
    found = []
    tasks = any(pair.scores for pair in pairs)
    for side in "ab":
        answers = [getattr(pair, side) for pair in pairs if not getattr(pair, side).error]
        empty = sum(answer.empty for answer in answers)
        thinking = sum(answer.empty and answer.cut for answer in answers)
        if answers and empty >= MANY * len(answers):
            why = f", {thinking} of them cut by max_tokens" if thinking else ""
            found.append(f"{empty} of {len(answers)} answers of {side.upper()} are empty{why}")
        cut = sum(answer.cut for answer in answers) - thinking
        if tasks and answers and cut >= MANY * len(answers):
            found.append(
                f"{cut} of {len(answers)} answers of {side.upper()} were cut; raise max_tokens"
            )
    return found


def _more(judgement: Judgement, n: int) -> int | None:
    return None if judgement.needed is None else max(1, judgement.needed - n)


def worst(pairs: Sequence[PairOfAnswers]) -> list[PairOfAnswers]:
    """The prompts on which B differs from A for the worse, worst first: by score, then by how much
    less likely it finds the prompt per token, then by how early the outputs part."""

    def loss(pair: PairOfAnswers) -> tuple[float, float, float]:
        score = pair.scores[0] - pair.scores[1] if pair.scores else 0.0
        found = pair.logprobs
        likelihood = (found.nll_b - found.nll_a) / found.tokens if found else 0.0
        return score, likelihood, -pair.same_tokens / max(1, *pair.lengths)

    differing = [p for p in pairs if p.answered and p.a.tokens != p.b.tokens]
    return sorted(differing, key=loss, reverse=True)[:WORST]


def _example(pair: PairOfAnswers) -> dict[str, Any]:
    found = pair.logprobs
    return {
        "prompt": pair.prompt.shown[-SHOWN:],
        "where": Path(pair.prompt.where).name,
        "a": pair.a.shown[:SHOWN],
        "b": pair.b.shown[:SHOWN],
        "same_tokens": pair.same_tokens,
        "scores": pair.scores,
        "nats_per_token": (found.nll_b - found.nll_a) / found.tokens if found else None,
    }


def text(report: Mapping[str, Any]) -> str:
    """The table for people."""
    how = "one at a time" if report["rate"] is None else f"at {report['rate']:g} prompts/s"
    width = max(12, *(len(row["metric"]) + 1 for row in report["metrics"]))
    lines = [
        *(f"{side.upper()}  {server_text(report[side])}" for side in "ab"),
        f"{report['n']} prompts, {how}, {100 * report['confidence']:.4g}% intervals "
        f"(look {report['look']})",
        "",
        f"{'metric':<{width}}{'A':>10}{'B':>10}  {'B against A':<34}{'n':>6}  verdict",
    ]
    for row in report["metrics"]:
        lines.append(
            f"{row['metric']:<{width}}{number(row['a']):>10}{number(row['b']):>10}  "
            f"{change(row):<34}{row['n']:>6}  {judged(row)}".rstrip()
        )
    lines += ["", *remarks(report)] if remarks(report) else []
    return "\n".join([*lines, "", f"verdict: {conclusion(report)}"])


def remarks(report: Mapping[str, Any]) -> list[str]:
    """List what went on beside the numbers, a sentence each."""
    found = []
    for side in "ab":
        for reason, count in report["refusals"][side].items():
            found.append(f"{side.upper()} gave no answer to {count} at the first try: {reason}")
        if report["retries"][side]:
            found.append(f"{report['retries'][side]} requests to {side.upper()} were tried again")
    for row in report["metrics"]:
        if row["metric"] in ("score", "probes") and row["note"]:
            found.append(f"{row['metric']}: {row['note']}")
        if row["metric"] == "kl" and row["value"] is not None and row["note"] != EXACT:
            found.append(f"kl is {row['note']}")
    found += [line for entry in report["probes"] for line in told(entry)]
    if report["late"]:
        found.append(
            f"{report['late']} prompts had to wait for a place: the servers do not keep up with "
            "this rate; raise --concurrency or lower --rate"
        )
    return found


def server_text(server: Mapping[str, Any]) -> str:
    """A served model in a few words."""
    formats = server["info"].get("formats", "none")
    price = server["price_per_hour"]
    parts = [
        f"{server['model']} at {server['url']}",
        *([formats] if formats != "none" else []),
        *([f"{price:g} per hour"] if price is not None else []),
    ]
    return ", ".join(parts)


def change(row: Mapping[str, Any]) -> str:
    """`1.02x [1.01, 1.03]`, or a plain value with its interval."""
    if row["value"] is None:
        return row["note"] or "nothing to compare"
    plus = "+" if row["change"] == "difference" else ""
    times = "x" if row["change"] == "ratio" else ""
    known = [row[end] for end in ("low", "high") if row[end] is not None]
    widest = max((abs(end - row["value"]) for end in known), default=0.0)
    digits = min(7, max(0, 1 - math.floor(math.log10(widest)))) if widest else 4
    low, value, high = (
        "unknown" if number is None else f"{number:{plus}.{digits}f}"
        for number in (row["low"], row["value"], row["high"])
    )
    return f"{value}{times} [{low}, {high}]"


def judged(row: Mapping[str, Any]) -> str:
    """The verdict of one metric with its limit, empty where it is not judged."""
    if row["verdict"] is None:
        return ""
    more = f", needs {row['needed']:,} prompts" if row["needed"] else ""
    return f"{row['verdict']} ({limit_text(row)}){more}"


def limit_text(row: Mapping[str, Any]) -> str:
    """`at most 1.02`, `at least -0.02`."""
    if row["worse"] == "both":
        return f"{1 / row['limit']:.3g} to {row['limit']:g}"
    return f"{'at least' if row['worse'] == 'below' else 'at most'} {row['limit']:g}"


def conclusion(report: Mapping[str, Any]) -> str:
    """The overall verdict in one sentence, with what it must not be read without."""
    return "; but ".join([_verdict(report), *report["warnings"]])


def _verdict(report: Mapping[str, Any]) -> str:
    rows = [row for row in report["metrics"] if row["verdict"]]
    decisive = [row["metric"] for row in rows if row["verdict"] == report["verdict"]]
    if not rows:
        return "undecided: no metric has a margin"
    sentence = f"{report['verdict']} ({', '.join(decisive)})"
    if report["verdict"] != "undecided":
        return sentence
    if report["more_prompts"] is None:
        asked = any(r["verdict"] == "undecided" and r["group"] in OTHER_QUESTIONS for r in rows)
        others = ", or too few tasks or probes" if asked else ""
        return f"{sentence}: too close to the margin, or nothing measured{others}"
    return (
        f"{sentence}: about {report['more_prompts']:,} more prompts are needed; append them to "
        f"{report['prompts']} and run the same command, which counts as another look"
    )


def number(value: float | None) -> str:
    """Four significant digits; a dash for nothing."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 3 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{min(6, max(0, digits))}f}"


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None

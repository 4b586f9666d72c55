"""Judging a comparison again: free on the same data, at a price on more."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from compress_methods.evaluation.statistics import mean_log_ratio
from tests.unit.vllm_compress.operations.abtest.conftest import COUNT, WARM_UP, Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Server, running
from vllm_compress.operations.abtest.comparison import spent_confidence
from vllm_compress.operations.abtest.scoring.judge import NON_INFERIOR, Limit, decide


def test_a_finished_comparison_is_judged_again_without_its_servers(
    compare: Compare, prompts: Path
) -> None:
    with running(Server()) as a, running(Server(noise=0.05)) as b:
        compare(a, b)
    first = compare.report
    assert compare(a, b, "--margin", "kl=1e-9", "--price-a", 2, "--price-b", 1) == 1
    assert compare.report["verdict"] == "inferior"
    assert compare.metric("cost")["n"] == COUNT
    assert compare.metric("perplexity")["value"] == first["metrics"][0]["value"]
    assert "holds a comparison of other prompts" in compare.fails(a, b, "--seed", 1)
    prompts.write_text('{"prompt": "another one"}\n')
    assert "holds a comparison of other prompts" in compare.fails(a, b)


def test_looking_again_spends_what_is_left_of_the_allowed_error(
    compare: Compare, servers: tuple[Server, Server], prompts: Path
) -> None:
    """Intervals of 97.5%, then 98.75%, then 99.375%: half, a quarter, an eighth of 5%."""
    asked: list[int] = []
    for look, more in enumerate((0, 30, 10), 1):
        added = [json.dumps({"prompt": f"look {look}, number {i}"}) for i in range(more)]
        prompts.write_text(prompts.read_text() + "".join(f"{line}\n" for line in added))
        compare(*servers, "--logprobs", 0)
        compare(*servers, "--logprobs", 0, "--margin", "errors=0.01")  # no new data, no new look
        assert compare.report["look"] == look
        assert compare.report["confidence"] == pytest.approx(1 - 0.05 / 2**look)
        asked.append(len(servers[0].streamed()) - WARM_UP * look)
    assert asked == [COUNT, COUNT + 30, COUNT + 40]  # each prompt once
    n, z = COUNT + 40, NormalDist().inv_cdf(1 - 0.05 / 16)
    assert compare.metric("errors")["high"] == pytest.approx(z**2 / (n + z**2), rel=1e-6)
    assert compare.report["n"] == n


def test_looks_without_end_err_no_more_often_than_was_allowed() -> None:
    """B at its margin, and a look after every 100 prompts: non-inferior at any of ten looks in at
    most 2.5% of comparisons (5% two-sided); without spending it were several times that."""
    generator = np.random.default_rng(0)
    limit = Limit(1.0, "above")
    wrong = {True: 0, False: 0}
    for _ in range(400):
        logs = generator.normal(size=1000)
        for spending in wrong:
            confidences = [spent_confidence(0.95, k) if spending else 0.95 for k in range(1, 11)]
            looks = (
                mean_log_ratio(np.ones(100 * k), np.exp(logs[: 100 * k]), c, serial=False)
                for k, c in enumerate(confidences, 1)
            )
            wrong[spending] += any(decide(e, limit) == NON_INFERIOR for e in looks)
    assert wrong[True] / 400 < 0.025 + 2 * 0.008
    assert wrong[False] / 400 > 0.06

"""A compressed model measured through vLLM gives the numbers it gives offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods import convert
from tests.e2e.support.server import FEWER_PROCESSES, VllmServer
from vllm_compress import cli

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Whole vocabularies are slow to send, so only a short piece of the text is measured with them.
LONG, SHORT = ["--length", "128", "--tokens", "1000"], ["--length", "64", "--tokens", "96"]


def measure(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    assert cli.main(["eval", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_served_and_offline_numbers_agree(
    novels_8m: Path,
    validation_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "int4"
    convert(novels_8m, "int4-rtn", model, quiet=True)
    command = [model, "--against", novels_8m, "--text", validation_text]
    offline, short = measure(capsys, *command, *LONG), measure(capsys, *command, *SHORT)
    # The quick kernels round to bfloat16.
    exactly = {**FEWER_PROCESSES, "VLLM_COMPRESS_KERNEL": "reference"}
    with VllmServer(model, "--dtype", "float32", "--max-logprobs", "-1", env=exactly) as server:
        bound = measure(capsys, *command, *LONG, "--url", f"{server.url}/v1")
        exact = measure(capsys, *command, *SHORT, "--url", server.url, "--logprobs", "-1")
        command[0] = "other"
        assert cli.main(["eval", *map(str, command), "--url", server.url]) == 2
    assert "other is not served; it serves" in capsys.readouterr().err

    for served, expected in ((bound, offline), (exact, short)):
        assert served["tokens"] == expected["tokens"]
        for key in ("perplexity", "base_perplexity", "top1_agreement"):
            assert served[key] == pytest.approx(expected[key], rel=1e-4)
    assert exact["kl_kind"] == offline["kl_kind"] == "exact"
    assert exact["kl"] == pytest.approx(short["kl"], rel=1e-3)
    assert bound["kl_kind"] == "lower_bound"
    assert 0.2 * offline["kl"] < bound["kl"] < offline["kl"]

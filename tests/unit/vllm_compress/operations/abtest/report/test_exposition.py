"""A comparison's result as Prometheus reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from compress_methods.errors import CompressError
from vllm_compress.operations.abtest.report.exposition import exposition, write_exposition

ROWS = [
    {"metric": "kl", "value": 0.004, "low": 0.003, "high": None},
    {"metric": "score", "value": None, "low": None, "high": None},
]
LABELS = {"deployment": "chat-int4", "service": "chat", "variant": "int4", "baseline": "chat-full"}


def report(verdict: str = "inferior") -> dict[str, Any]:
    info = {name: LABELS[name] for name in ("deployment", "service", "variant")}
    return {
        "verdict": verdict,
        "n": 40,
        "metrics": ROWS,
        "a": {"model": "full", "info": {"deployment": "chat-full", "service": "chat"}},
        "b": {"model": "int4", "info": info},
    }


def read(text: str) -> dict[tuple[str, str, str], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            extra = labels.pop("metric", ""), labels.pop("bound", "")
            assert labels == LABELS
            found[sample.name.removeprefix("vllm_compress_quality_"), *extra] = sample.value
    return found


@pytest.mark.parametrize(
    ("verdict", "number"), [("inferior", -1), ("undecided", 0), ("non-inferior", 1)]
)
def test_what_was_measured_is_there_and_nothing_else(verdict: str, number: int) -> None:
    assert read(exposition(report(verdict), now=5.0)) == {
        ("value", "kl", ""): 0.004,
        ("bound", "kl", "low"): 0.003,
        ("verdict", "", ""): number,
        ("prompts", "", ""): 40,
        ("time_seconds", "", ""): 5,
    }


def test_a_server_without_the_plugin_is_named_by_its_model() -> None:
    block = report()
    block["b"]["info"] = {}
    assert 'vllm_compress_quality_verdict{baseline="chat-full",deployment="int4"' in exposition(
        block
    )


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_exposition(tmp_path / "quality.prom", report())
    assert "\nvllm_compress_quality_verdict{" in (tmp_path / "quality.prom").read_text()
    with pytest.raises(CompressError, match=r"a\.prom: cannot be written"):
        write_exposition(tmp_path / "none" / "a.prom", report())

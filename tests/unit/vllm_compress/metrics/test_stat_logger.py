"""The deployment's series agree with what vLLM reports, and nothing in them can stop a server.

vLLM's own statistics and config classes are fed to the logger, so a field renamed there fails here.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import (
    IterationStats,
    PrefillStats,
    RequestStateStats,
    SchedulerStats,
)
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.conftest import REPOSITORY
from vllm_compress.metrics import adapter, stat_logger
from vllm_compress.metrics.stat_logger import PREFIX, DeploymentStatLogger
from vllm_compress.names import DEPLOYMENT_VARIABLE

MODEL = REPOSITORY / "tests" / "assets" / "novels-8m"
GAUGES = {"requests_running", "requests_waiting", "kv_cache_usage_ratio"}
GAUGES |= {"adapter_requests", "gpus", "devices", "weight_bytes", "deployment_info"}
GAUGES |= {"device_price_per_hour", "objective_seconds", "objective_target_ratio"}
COUNTERS = {"prompt_tokens", "prompt_tokens_cached", "generation_tokens", "requests"}
COUNTERS |= {"preemptions", "energy_joules", "objective_requests"}
COUNTERS |= {"draft_tokens", "draft_tokens_accepted"}
ABSENT = {"device_price_per_hour", "objective_seconds", "objective_target_ratio"}
ABSENT |= {"adapter_requests"}
ABSENT |= {"energy_joules", "objective_requests"}  # unless a file, or the machine, says something
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "request_latency_seconds",
    "time_in_queue_seconds",
}


@pytest.fixture(scope="session")
def config() -> VllmConfig:
    """The config vLLM makes of the small model."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(
        model=str(MODEL), served_model_name=["novels", "alias"], enforce_eager=True
    ).create_engine_config()


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A deployment of this test's own, as series live as long as the process."""
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, request.node.name)
    return str(request.node.name)


def value(series: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + series, labels)


def step(prompt: int, tokens: int, *, reason: FinishReason, latency: float = 2.0) -> IterationStats:
    """What vLLM makes of one request that arrived, answered with `tokens` tokens and finished."""
    stats = IterationStats()
    prefill = PrefillStats()
    prefill.set(prompt, num_local_cached_tokens=prompt // 2, num_external_cached_tokens=0)
    stats.prompt_token_stats.update_from_output(prefill)
    stats.num_generation_tokens = tokens
    stats.time_to_first_tokens_iter.append(latency / 4)
    state = RequestStateStats(
        num_generation_tokens=tokens,
        arrival_time=stats.iteration_timestamp - latency,
        queued_ts=9.0,
        scheduled_ts=9.0 + latency / 8,
        first_token_ts=10.0,
        last_token_ts=10.0 + latency / 2,
    )
    stats.update_from_finished_request(reason, "r", prompt, None, state)
    return stats


def test_series_are_the_sums_of_what_vllm_reports(config: VllmConfig, name: str) -> None:
    logger = DeploymentStatLogger(config, [0])
    load = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.25
    )
    load.spec_decoding_stats = SpecDecodingStats(3, 1, num_draft_tokens=3, num_accepted_tokens=2)
    logger.record(load, step(7, 5, reason=FinishReason.STOP), mm_cache_stats=None, engine_idx=0)
    second = step(9, 1, reason=FinishReason.LENGTH, latency=8.0)
    second.num_preempted_reqs = 2
    logger.record(None, second, engine_idx=0)
    logger.record(None, None)
    assert value("prompt_tokens_total", deployment=name) == 16
    assert value("generation_tokens_total", deployment=name) == 6
    assert value("preemptions_total", deployment=name) == 2
    assert value("draft_tokens_total", deployment=name) == 3
    assert value("draft_tokens_accepted_total", deployment=name) == 2
    finished = {
        str(reason): value("requests_total", deployment=name, finish_reason=str(reason))
        for reason in FinishReason
    }
    assert finished == {"stop": 1, "length": 1, "abort": 0, "error": 0, "repetition": 0}
    assert value("requests_running", deployment=name, engine="0") == 3
    assert value("requests_waiting", deployment=name, engine="0") == 3
    assert value("kv_cache_usage_ratio", deployment=name, engine="0") == 0.25
    assert value("time_to_first_token_seconds_sum", deployment=name) == pytest.approx(2.5)
    assert value("time_to_first_token_seconds_count", deployment=name) == 2
    assert value("prompt_tokens_cached_total", deployment=name) == 3 + 4
    assert value("time_in_queue_seconds_sum", deployment=name) == pytest.approx(1.25)
    assert value("time_in_queue_seconds_count", deployment=name) == 2
    assert value("request_latency_seconds_sum", deployment=name) == pytest.approx(10)
    assert value("request_latency_seconds_count", deployment=name) == 2


def test_adapters_have_a_label_each_up_to_a_bound(config: VllmConfig, name: str) -> None:
    logger = DeploymentStatLogger(config, [0])

    def requests(adapter: str) -> float | None:
        return value("adapter_requests", deployment=name, engine="0", adapter=adapter)

    load = SchedulerStats(running_lora_adapters={"a": 2}, waiting_lora_adapters={"a": 1, "b": 1})
    logger.record(load, None, engine_idx=0)
    assert (requests("a"), requests("b")) == (3, 1)
    logger.record(SchedulerStats(running_lora_adapters={"b": 4}), None, engine_idx=0)
    assert (requests("a"), requests("b")) == (0, 4)
    many = {f"adapter-{i}": 1 for i in range(100)}
    logger.record(SchedulerStats(running_lora_adapters=many), None, engine_idx=0)
    assert requests("other") == 100 - (stat_logger.MOST_ADAPTERS - 2)
    labels = [f"adapter-{i}" for i in range(100) if requests(f"adapter-{i}") is not None]
    assert len(labels) == stat_logger.MOST_ADAPTERS - 2
    logger.record(SchedulerStats(), None, engine_idx=0)
    assert (requests("b"), requests("other")) == (0, 0)


def test_one_token_has_no_time_per_output_token(config: VllmConfig, name: str) -> None:
    logger = DeploymentStatLogger(config, [0])
    logger.record(None, step(7, 1, reason=FinishReason.LENGTH))
    assert value("time_per_output_token_seconds_count", deployment=name) == 0
    logger.record(None, step(7, 5, reason=FinishReason.LENGTH))
    assert value("time_per_output_token_seconds_count", deployment=name) == 1
    assert value("time_per_output_token_seconds_sum", deployment=name) == pytest.approx(1 / 4)


def test_deployment_is_the_served_name_unless_it_is_named(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEPLOYMENT_VARIABLE, raising=False)
    DeploymentStatLogger(config, [0])
    assert value("devices", deployment="novels") == 1


def test_names_follow_prometheus_and_carry_the_label(config: VllmConfig, name: str) -> None:
    DeploymentStatLogger(config, [0])
    families = {
        family.name.removeprefix(PREFIX): family
        for family in text_string_to_metric_families(generate_latest().decode())
        if family.name.startswith(PREFIX) and not family.name.endswith("_created")
    }
    assert set(families) == GAUGES | COUNTERS | HISTOGRAMS
    for short, family in families.items():
        kinds = {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS}
        assert short in kinds[family.type]
        assert family.documentation
        assert all(sample.labels.get("deployment") for sample in family.samples), short
        assert ":" not in family.name
    for short in (GAUGES | COUNTERS | HISTOGRAMS) - ABSENT:
        mine = [s for s in families[short].samples if s.labels["deployment"] == name]
        assert mine, f"{short} does not exist from the start"
        assert short not in COUNTERS or {s.name for s in mine} >= {f"{PREFIX}{short}_total"}


def test_static_series_say_what_is_served(config: VllmConfig, name: str) -> None:
    DeploymentStatLogger(config, [0])
    assert value("devices", deployment=name) == 1
    assert value("gpus", deployment=name) == 0
    header = sum(t.nbytes for t in entries(MODEL))
    assert value("weight_bytes", deployment=name) == header
    (info,) = [
        sample
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == f"{PREFIX}deployment_info" and sample.labels["deployment"] == name
    ]
    assert info.value == 1
    assert (info.labels["service"], info.labels["variant"]) == (name, "full")
    assert info.labels["device_type"]
    assert info.labels["model_name"] == "novels"
    assert info.labels["base_model"] == str(MODEL)
    assert info.labels["formats"] == "none"
    assert info.labels["bits_per_weight"] == "16.00"
    assert info.labels["sparsity"] == "0.00"
    assert info.labels["vllm_compress_version"]
    assert info.labels["vllm_version"]


def entries(directory: Path) -> list[Any]:
    from compress_methods.checkpoint.compressed import read_entries

    return list(read_entries(directory).values())


def test_accelerators_count_over_tensor_and_data_parallelism(name: str) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="nowhere/at-all", served_model_name="m"),
        parallel_config=SimpleNamespace(world_size=4),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    DeploymentStatLogger(config, [0, 1])
    assert value("gpus", deployment=name) == 8
    assert value("devices", deployment=name) == 8


def test_engines_keep_gauges_of_their_own_and_share_counters(config: VllmConfig, name: str) -> None:
    logger = DeploymentStatLogger(config, [0, 1])
    for engine in (0, 1):
        load = SchedulerStats(num_running_reqs=engine + 1)
        logger.record(load, step(4, 2, reason=FinishReason.STOP), engine_idx=engine)
    assert value("requests_running", deployment=name, engine="0") == 1
    assert value("requests_running", deployment=name, engine="1") == 2
    assert value("prompt_tokens_total", deployment=name) == 8


def test_loggers_of_one_process_share_their_series(config: VllmConfig, name: str) -> None:
    for _ in range(2):
        logger = DeploymentStatLogger(config, [0])
        logger.record(None, step(4, 2, reason=FinishReason.STOP))
    assert value("prompt_tokens_total", deployment=name) == 8


def test_no_exception_reaches_vllm(
    config: VllmConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    monkeypatch.setattr(stat_logger.logger, "warning", lambda text, **_: said.append(text))
    logger = DeploymentStatLogger(config, [0])
    broken = step(4, 2, reason=FinishReason.STOP)
    broken.time_to_first_tokens_iter = ["soon"]  # type: ignore[list-item]
    logger.record(SchedulerStats(), broken)
    logger.record(SchedulerStats(), broken)
    DeploymentStatLogger(None, [0]).record(SchedulerStats(), None)
    assert len(said) == 2  # one for each logger


def test_a_field_vllm_renamed_costs_its_own_series_only(
    config: VllmConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(adapter.logger, "warning", lambda text, field: said.append(field))
    monkeypatch.setattr(adapter, "_missing", set())
    logger = DeploymentStatLogger(config, [0])
    for _ in range(2):
        stats = step(4, 2, reason=FinishReason.STOP)
        del stats.num_generation_tokens
        logger.record(SchedulerStats(num_running_reqs=5), stats)
    assert said == ["IterationStats.num_generation_tokens"]
    assert value("generation_tokens_total", deployment=name) == 0
    assert value("prompt_tokens_total", deployment=name) == 8
    assert value("requests_running", deployment=name, engine="0") == 5

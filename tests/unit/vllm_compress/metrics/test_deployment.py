"""What a deployment file says shows in the series, and nothing shows that nobody said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from vllm_compress.metrics import adapter, energy
from vllm_compress.metrics.deployment import declare_environment
from vllm_compress.metrics.stat_logger import PREFIX, DeploymentStatLogger
from vllm_compress.names import DEPLOYMENT_VARIABLE, VARIABLES
from vllm_compress.operations.deployment_file import (
    Deployment,
    Device,
    Objectives,
    parse_deployment,
)


def config(model: str = "nowhere/at-all", world_size: int = 1, device: str = "cpu") -> Any:
    """As much of vLLM's config as the logger reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=model, served_model_name="m"),
        parallel_config=SimpleNamespace(world_size=world_size),
        device_config=SimpleNamespace(device_type=device),
    )


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A deployment of this test's own, as series live as long as the process."""
    return str(request.node.name)


def start(
    monkeypatch: pytest.MonkeyPatch, deployment: Deployment, **kwargs: Any
) -> DeploymentStatLogger:
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, deployment.to_json())
    logger = DeploymentStatLogger(config(**kwargs), [0])
    assert logger._ready
    return logger


def samples(series: str, name: str) -> dict[tuple[str, ...], float]:
    """By the values of the labels beside `deployment`, in the order of the labels' names."""
    return {
        tuple(v for k, v in sorted(sample.labels.items()) if k != "deployment"): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == PREFIX + series and sample.labels["deployment"] == name
    }


def info(name: str) -> dict[str, str]:
    (found,) = [
        sample.labels
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == f"{PREFIX}deployment_info" and sample.labels["deployment"] == name
    ]
    return found


def test_requests_are_judged_by_the_objectives_they_have(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    objectives = Objectives(ttft=0.5, tpot=0.05, target=0.9)
    logger = start(monkeypatch, Deployment(name, "m", name, objectives=objectives))
    kept = {("true", "ttft"): 0.0, ("false", "ttft"): 0.0}
    kept |= {("true", "tpot"): 0.0, ("false", "tpot"): 0.0}
    assert samples("objective_requests_total", name) == kept
    assert samples("objective_seconds", name) == {("ttft",): 0.5, ("tpot",): 0.05}
    assert samples("objective_target_ratio", name) == {(): 0.9}
    stats = IterationStats()
    stats.time_to_first_tokens_iter += [0.1, 0.5, 0.51]  # the limit itself is within it
    for tokens, seconds in ((5, 0.01), (5, 0.06), (1, 0.0)):  # one token has no tpot to judge
        stats.finished_requests.append(
            FinishedRequestStats(
                "stop", None, 1.0, 4, 0, tokens, mean_time_per_output_token=seconds
            )
        )
    logger.record(None, stats)
    kept |= {("true", "ttft"): 2.0, ("false", "ttft"): 1.0}
    kept |= {("true", "tpot"): 1.0, ("false", "tpot"): 1.0}
    assert samples("objective_requests_total", name) == kept


def test_one_objective_is_enough(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start(monkeypatch, Deployment(name, "m", name, objectives=Objectives(tpot=1)))
    assert samples("objective_seconds", name) == {("tpot",): 1.0}
    assert {key[1] for key in samples("objective_requests_total", name)} == {"tpot"}


def test_labels_and_price_follow_the_file(
    monkeypatch: pytest.MonkeyPatch, name: str, novels_8m: Path
) -> None:
    block = {"version": 1, "name": name, "service": "chat", "variant": "v", "model": "m"}
    device = {"type": "my-host", "count": 1, "price_per_hour": 0.4}
    deployment = parse_deployment(block | {"device": device}, Path("x.yaml"))
    start(monkeypatch, deployment, model=str(novels_8m), world_size=2)
    found = info(name)
    assert (found["service"], found["variant"], found["device_type"]) == ("chat", "v", "my-host")
    assert samples("device_price_per_hour", name) == {(): 0.4}
    assert samples("devices", name) == {(): 1}  # two ranks on the one host that is paid for


def test_without_a_file_the_checkpoint_and_the_machine_speak(
    monkeypatch: pytest.MonkeyPatch, name: str, novels_8m: Path
) -> None:
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, name)
    DeploymentStatLogger(config(str(novels_8m), world_size=2), [0])
    found = info(name)
    assert (found["service"], found["variant"]) == (name, "full")
    assert found["device_type"] == adapter.device_name(accelerated=False)
    assert samples("devices", name) == {(): 2}
    for series in ("device_price_per_hour", "objective_seconds", "objective_requests_total"):
        assert samples(series, name) == {}


def test_accelerators_are_those_vllm_takes_whatever_the_file_counts(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    deployment = Deployment(name, "m", name, device=Device("gpu-of-mine", 1, 2.0))
    start(monkeypatch, deployment, world_size=4, device="cuda")
    assert samples("devices", name) == samples("gpus", name) == {(): 4}
    assert samples("energy_joules_total", name) == {}  # there is no such GPU here


def test_energy_of_the_host_is_counted_for_cpus_only(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    counted: list[list[str]] = []
    monkeypatch.setattr(energy, "rapl_meters", lambda: [energy.Meter("package-0", lambda: 0.0)])
    monkeypatch.setattr(energy, "count", lambda meters, _: counted.append([*meters]))
    start(monkeypatch, Deployment(name, "m", name))
    start(monkeypatch, Deployment(name, "m", name), device="cuda")
    assert [len(meters) for meters in counted] == [1, 0]


@pytest.mark.parametrize(
    ("parallel", "local"),
    [
        ({}, True),
        ({"data_parallel_size": 2, "data_parallel_size_local": 2}, True),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, False),
        (
            {
                "data_parallel_size": 2,
                "data_parallel_size_local": 1,
                "data_parallel_external_lb": True,
            },
            True,
        ),
        ({"distributed_executor_backend": "ray"}, False),
        ({"nnodes": 2}, False),
    ],
)
def test_energy_needs_every_worker_on_this_host(parallel: dict[str, Any], local: bool) -> None:
    from vllm.config import ParallelConfig

    settings = ParallelConfig()
    for key, value in parallel.items():
        assert hasattr(settings, key)  # vLLM still calls it that
        setattr(settings, key, value)
    assert adapter._all_local(settings) is local


def test_a_damaged_variable_costs_the_series_not_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, '{"name": ')
    logger = DeploymentStatLogger(config(), [0])
    logger.record(None, IterationStats())
    assert not logger._ready


def test_vllm_knows_our_variables_and_none_changes_a_compile_cache_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import envs
    from vllm.platforms import current_platform

    declare_environment()
    for name in VARIABLES:
        monkeypatch.setenv(name, "anything")
        assert envs.environment_variables[name]() is None
    current_platform.validate_environ(True)

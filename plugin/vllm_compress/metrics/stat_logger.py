"""The Prometheus series of a deployment, on vLLM's own /metrics beside vLLM's own series.

vLLM makes one `DeploymentStatLogger` in every API-server process (entry point
`vllm.stat_logger_plugins`). Counters and histograms of several processes add up; gauges show the
most recent value, and those of an engine carry its number, as each step's load is reported to one
process only. Latencies are the server's: from the request's arrival in vLLM, without the network.

Anything that goes wrong in here is logged once and swallowed, because an exception from a stat
logger stops the server. One thing changes for every model once a stat logger is installed: vLLM
keeps statistics even with `--disable-log-stats`. `VLLM_PLUGINS=` (empty) switches the plugin off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_compress.metrics import adapter, energy
from vllm_compress.metrics.checkpoint_summary import (
    CheckpointSummary,
    summarize_checkpoint,
    variant_of,
)
from vllm_compress.metrics.deployment import Deployment, Device, current_deployment
from vllm_compress.metrics.series import PREFIX, Series, series
from vllm_compress.versions import own_version, vllm_version

logger = init_logger("vllm.vllm_compress.metrics")

MOST_ADAPTERS, OTHER_ADAPTERS = 32, "other"

__all__ = ["PREFIX", "DeploymentStatLogger"]


class DeploymentStatLogger(AggregateStatLoggerBase):
    """vLLM's statistics as series of one deployment."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._complained = False
        self._ready = False
        try:
            self._start(vllm_config, list(engine_indexes or [0]))
            self._ready = True
        except Exception:
            self._complain()

    def _start(self, config: Any, engines: list[int]) -> None:
        """Make every series with its labels, so that it exists before the first request."""
        setup = adapter.read_setup(config, engines)
        deployment = current_deployment(setup.model, setup.served_name)
        name = deployment.name
        every = series()
        self._deployment = name
        self._series = every
        self._prompt_tokens = every.prompt_tokens.labels(name)
        self._cached_tokens = every.cached_tokens.labels(name)
        self._generation_tokens = every.generation_tokens.labels(name)
        self._preemptions = every.preemptions.labels(name)
        self._draft_tokens = every.draft_tokens.labels(name)
        self._accepted_tokens = every.accepted_tokens.labels(name)
        self._first_token = every.first_token.labels(name)
        self._per_token = every.per_token.labels(name)
        self._latency = every.latency.labels(name)
        self._queue = every.queue.labels(name)
        for reason in adapter.finish_reasons():
            every.requests.labels(name, reason)
        for engine in engines:
            for gauge in (every.running, every.waiting, every.kv_cache_usage):
                gauge.labels(name, str(engine)).set(0)
        self._adapters: dict[str, dict[str, int]] = {str(engine): {} for engine in engines}
        self._objectives = _set_objectives(every, deployment)
        _set_devices(every, deployment, setup)
        _set_checkpoint(every, deployment, setup)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        """Called by vLLM after every step, either statistic possibly None."""
        if not self._ready:
            return
        try:
            if scheduler_stats is not None:
                self._record_load(adapter.read_load(scheduler_stats), str(engine_idx))
            if iteration_stats is not None:
                self._record_step(adapter.read_step(iteration_stats))
        except Exception:
            self._complain()

    def _record_load(self, load: adapter.EngineLoad, engine: str) -> None:
        for gauge, value in (
            (self._series.running, load.running),
            (self._series.waiting, load.waiting),
            (self._series.kv_cache_usage, load.kv_cache_usage),
        ):
            if value is not None:
                gauge.labels(self._deployment, engine).set(value)
        self._record_adapters(load.adapters, engine)
        self._draft_tokens.inc(load.drafted or 0)
        self._accepted_tokens.inc(load.accepted or 0)

    def _record_adapters(self, requests: Mapping[str, int], engine: str) -> None:
        """Adapters come at the wish of whoever may load them, so their labels are bounded."""
        count = dict.fromkeys(self._adapters[engine], 0)
        for name, number in requests.items():
            label = name if name in count or len(count) < MOST_ADAPTERS else OTHER_ADAPTERS
            count[label] = count.get(label, 0) + number
        self._adapters[engine].update(count)
        for label, number in count.items():
            self._series.adapter_requests.labels(self._deployment, engine, label).set(number)

    def _record_step(self, step: adapter.EngineStep) -> None:
        for counter, value in (
            (self._prompt_tokens, step.prompt_tokens),
            (self._cached_tokens, step.cached_tokens),
            (self._generation_tokens, step.generation_tokens),
            (self._preemptions, step.preemptions),
        ):
            if value:
                counter.inc(value)
        for seconds in step.first_tokens:
            self._first_token.observe(seconds)
            self._judge("ttft", seconds)
        for request in step.finished:
            if request.reason is not None:
                self._series.requests.labels(self._deployment, request.reason).inc()
            if request.latency is not None:
                self._latency.observe(request.latency)
            if request.time_per_output_token is not None:
                self._per_token.observe(request.time_per_output_token)
                self._judge("tpot", request.time_per_output_token)
            if request.time_in_queue is not None:
                self._queue.observe(request.time_in_queue)

    def _judge(self, objective: str, seconds: float) -> None:
        if objective in self._objectives:
            limit, met, missed = self._objectives[objective]
            (met if seconds <= limit else missed).inc()

    def log_engine_initialized(self) -> None:
        """Nothing to add: everything static is set in the constructor."""

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "vllm_compress_* metrics are incomplete; the server goes on, and this is said once",
                exc_info=True,
            )


def _set_objectives(
    every: Series, deployment: Deployment
) -> dict[str, tuple[float, Counter, Counter]]:
    """Return, by objective, its seconds and the counters of requests that met and missed it."""
    found = {}
    if deployment.objectives is not None:
        name = deployment.name
        every.objective_target.labels(name).set(deployment.objectives.target)
        for objective, seconds in deployment.objectives.seconds.items():
            every.objective_seconds.labels(name, objective).set(seconds)
            met, missed = (
                every.objective_requests.labels(name, objective, kept) for kept in ("true", "false")
            )
            found[objective] = (seconds, met, missed)
    return found


def _set_devices(every: Series, deployment: Deployment, setup: adapter.Setup) -> None:
    name, device = deployment.name, deployment.device
    counted = not setup.accelerated and device != Device()  # a host may run several workers
    every.devices.labels(name).set(device.count if counted else setup.devices)
    every.gpus.labels(name).set(setup.devices if setup.accelerated else 0)
    if device.price_per_hour is not None:
        every.price.labels(name).set(device.price_per_hour)
    meters = energy.nvml_meters(setup.gpus)
    if setup.local and not setup.accelerated:
        meters = energy.rapl_meters()
    energy.count(meters, lambda device, joules: every.energy.labels(name, device).inc(joules))


def _set_checkpoint(every: Series, deployment: Deployment, setup: adapter.Setup) -> None:
    """Set what is served as labels; it cannot change while this server lives."""
    name = deployment.name
    summary = summarize_checkpoint(
        setup.model, setup.quantization, revision=setup.revision, cache=setup.download_dir
    )
    if summary.weight_bytes is not None:
        every.weight_bytes.labels(name).set(summary.weight_bytes)
    place = (
        deployment.service,
        deployment.variant or variant_of(summary.formats),
        deployment.device.type or adapter.device_name(setup.accelerated),
    )
    every.info.labels(name, *place, *_info(setup.served_name, summary)).set(1)


def _info(served_name: str, summary: CheckpointSummary) -> tuple[str, ...]:
    """Return the values of the last INFO_LABELS; empty where unknown."""
    bits, sparsity = summary.bits_per_weight, summary.sparsity
    return (
        served_name,
        summary.base_model,
        summary.formats,
        "" if bits is None else f"{bits:.2f}",
        "" if sparsity is None else f"{sparsity:.2f}",
        own_version(),
        vllm_version() or "",
    )

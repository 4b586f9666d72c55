"""vLLM's statistics and config, read in one place: vLLM declares those classes unstable.

A field that a newer vLLM has renamed comes out as None, its series stands still and one warning
names it; the rest goes on. Two things vLLM 0.32 does not report are absent here as well: requests
whose client went away before the end never reach `finished`, and offline `LLM` has no logger.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_compress.metrics")
_missing: set[str] = set()


@dataclass(frozen=True)
class EngineLoad:
    """One engine at one moment; tokens that a draft wrote ahead in the step, those accepted."""

    running: int | None
    waiting: int | None
    kv_cache_usage: float | None
    drafted: int | None = None
    accepted: int | None = None
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Requests of each LoRA adapter that has any, running or waiting."""


@dataclass(frozen=True)
class FinishedRequest:
    """One finished sequence. One token has no time per output token, and what was aborted before
    its turn no time in the queue."""

    reason: str | None
    latency: float | None
    time_per_output_token: float | None
    time_in_queue: float | None


@dataclass(frozen=True)
class EngineStep:
    """What one step of one engine brought to this API server."""

    prompt_tokens: int | None
    cached_tokens: int | None
    generation_tokens: int | None
    preemptions: int | None
    first_tokens: Sequence[float]
    finished: Sequence[FinishedRequest]


@dataclass(frozen=True)
class Setup:
    """What the metrics need of vLLM's config.

    `local`: all workers are on this host. `gpus`: NVML's indices of theirs; empty where they are
    not NVIDIA's, or not all known.
    """

    model: str
    served_name: str
    quantization: str | None
    revision: str | None
    download_dir: str | None
    devices: int
    accelerated: bool
    local: bool
    gpus: Sequence[int]


def read_load(stats: Any) -> EngineLoad:
    """Read `SchedulerStats`. Requests held back for any reason count as waiting."""
    waiting = _field(stats, "num_waiting_reqs")
    deferred = _field(stats, "num_skipped_waiting_reqs")
    ahead = _field(stats, "spec_decoding_stats")
    adapters: Counter[str] = Counter()
    for state in ("running", "waiting"):
        adapters.update(_field(stats, f"{state}_lora_adapters") or {})
    return EngineLoad(
        running=_field(stats, "num_running_reqs"),
        waiting=None if waiting is None else waiting + (deferred or 0),
        kv_cache_usage=_field(stats, "kv_cache_usage"),
        drafted=None if ahead is None else _field(ahead, "num_draft_tokens"),
        accepted=None if ahead is None else _field(ahead, "num_accepted_tokens"),
        adapters=adapters,
    )


def read_step(stats: Any) -> EngineStep:
    """Read `IterationStats`. Prompt tokens found in the prefix cache count, too."""
    prompt = _field(stats, "prompt_token_stats")
    return EngineStep(
        prompt_tokens=None if prompt is None else _field(prompt, "total"),
        cached_tokens=None if prompt is None else _field(prompt, "cached_tokens"),
        generation_tokens=_field(stats, "num_generation_tokens"),
        preemptions=_field(stats, "num_preempted_reqs"),
        first_tokens=_field(stats, "time_to_first_tokens_iter") or (),
        finished=[_finished(one) for one in _field(stats, "finished_requests") or ()],
    )


def _finished(stats: Any) -> FinishedRequest:
    reason = _field(stats, "finish_reason")
    several = (_field(stats, "num_generation_tokens") or 0) > 1
    queued = _field(stats, "queued_time")
    return FinishedRequest(
        reason=None if reason is None else str(reason),
        latency=_field(stats, "e2e_latency"),
        time_per_output_token=_field(stats, "mean_time_per_output_token") if several else None,
        time_in_queue=None if queued is None or queued < 0 else queued,
    )


def read_setup(config: Any, engines: Sequence[int]) -> Setup:
    """Read `VllmConfig`. Each data-parallel engine has `world_size` workers of its own."""
    model = config.model_config
    served = getattr(model, "served_model_name", None) or model.model
    device = getattr(config.device_config, "device_type", "cpu")
    load = getattr(config, "load_config", None)
    local = _all_local(config.parallel_config)
    return Setup(
        model=str(model.model),
        served_name=str(served if isinstance(served, str) else served[0]),
        quantization=getattr(model, "quantization", None),
        revision=getattr(model, "revision", None),
        download_dir=getattr(load, "download_dir", None),
        devices=config.parallel_config.world_size * max(1, len(engines)),
        accelerated=device != "cpu",
        local=local,
        gpus=_gpus(config.parallel_config) if local and device == "cuda" else (),
    )


def _all_local(parallel: Any) -> bool:
    """Ray places workers where it likes; several nodes, and engines that joined from elsewhere."""
    engines = getattr(parallel, "data_parallel_size", 1)
    here = getattr(parallel, "data_parallel_size_local", engines)
    return (
        getattr(parallel, "nnodes", 1) == 1
        and getattr(parallel, "distributed_executor_backend", None) != "ray"
        and (here == engines or bool(getattr(parallel, "local_engines_only", False)))
    )


def _gpus(parallel: Any) -> Sequence[int]:
    """As vLLM hands them out: in order, from `--device-ids` or else CUDA_VISIBLE_DEVICES."""
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cuda():  # ROCm's are called cuda, too
            return ()
        count = parallel.world_size * max(1, getattr(parallel, "data_parallel_size_local", 1))
        given = getattr(parallel, "assigned_physical_gpu_ids", None)
        physical = current_platform.device_id_to_physical_device_id
        return [given[i] if given else physical(i) for i in range(count)]
    except Exception:
        return ()


def device_name(accelerated: bool) -> str:
    """Name the machine's accelerators, or its processor."""
    try:
        if accelerated:
            from vllm.platforms import current_platform

            return str(current_platform.get_device_name())
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except Exception:
        logger.debug("the device has no name", exc_info=True)
    return platform.machine()


def finish_reasons() -> list[str]:
    """List all of them, so that every series exists from the start."""
    try:
        from vllm.v1.engine import FinishReason

        return [str(reason) for reason in FinishReason]
    except Exception:
        return ["stop", "length", "abort", "error"]


def _field(stats: Any, name: str) -> Any:
    value = getattr(stats, name, None)
    if value is None and not hasattr(stats, name):
        field = f"{type(stats).__name__}.{name}"
        if field not in _missing:
            _missing.add(field)
            logger.warning("this vLLM has no %s; metrics that need it stay as they are", field)
    return value

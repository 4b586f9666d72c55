"""vLLM's statistics and config, read in one place: vLLM declares those classes unstable.

A field that a newer vLLM has renamed comes out as None, its series stands still and one warning
names it; the rest goes on. Two things vLLM 0.32 does not report are absent here as well: requests
whose client went away before the end never reach `finished`, and offline `LLM` has no logger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_compress.metrics")
_missing: set[str] = set()


@dataclass(frozen=True)
class Load:
    """One engine at one moment."""

    running: int | None
    waiting: int | None
    kv_cache_usage: float | None


@dataclass(frozen=True)
class Finished:
    """One finished sequence. One token has no time per output token."""

    reason: str | None
    latency: float | None
    time_per_output_token: float | None


@dataclass(frozen=True)
class Step:
    """What one step of one engine brought to this API server."""

    prompt_tokens: int | None
    generation_tokens: int | None
    preemptions: int | None
    first_tokens: Sequence[float]
    finished: Sequence[Finished]


@dataclass(frozen=True)
class Setup:
    """What the metrics need of vLLM's config."""

    model: str
    served_name: str
    quantization: str | None
    revision: str | None
    download_dir: str | None
    devices: int
    accelerated: bool


def read_load(stats: Any) -> Load:
    """Of `SchedulerStats`. Waiting are those held back for any reason."""
    waiting = _field(stats, "num_waiting_reqs")
    deferred = _field(stats, "num_skipped_waiting_reqs")
    return Load(
        running=_field(stats, "num_running_reqs"),
        waiting=None if waiting is None else waiting + (deferred or 0),
        kv_cache_usage=_field(stats, "kv_cache_usage"),
    )


def read_step(stats: Any) -> Step:
    """Of `IterationStats`. Prompt tokens count whether computed or found in the prefix cache."""
    prompt = _field(stats, "prompt_token_stats")
    return Step(
        prompt_tokens=None if prompt is None else _field(prompt, "total"),
        generation_tokens=_field(stats, "num_generation_tokens"),
        preemptions=_field(stats, "num_preempted_reqs"),
        first_tokens=_field(stats, "time_to_first_tokens_iter") or (),
        finished=[_finished(one) for one in _field(stats, "finished_requests") or ()],
    )


def _finished(stats: Any) -> Finished:
    reason = _field(stats, "finish_reason")
    several = (_field(stats, "num_generation_tokens") or 0) > 1
    return Finished(
        reason=None if reason is None else str(reason),
        latency=_field(stats, "e2e_latency"),
        time_per_output_token=_field(stats, "mean_time_per_output_token") if several else None,
    )


def read_setup(config: Any, engines: Sequence[int]) -> Setup:
    """Of `VllmConfig`. Each engine of data parallelism has `world_size` workers of its own."""
    model = config.model_config
    served = getattr(model, "served_model_name", None) or model.model
    device = getattr(config.device_config, "device_type", "cpu")
    load = getattr(config, "load_config", None)
    return Setup(
        model=str(model.model),
        served_name=str(served if isinstance(served, str) else served[0]),
        quantization=getattr(model, "quantization", None),
        revision=getattr(model, "revision", None),
        download_dir=getattr(load, "download_dir", None),
        devices=config.parallel_config.world_size * max(1, len(engines)),
        accelerated=device != "cpu",
    )


def finish_reasons() -> list[str]:
    """All of them, so that every series exists from the start."""
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

"""vLLM's offline engine in a process of its own, for tests that need log-probabilities of many
models: vLLM is imported once (which is most of a start) and models are loaded one after another.

    with Engine() as engine:
        result = engine.run(model_dir, prompts, dtype="float32")
        result.logprobs[0][5]    # of token 5 of prompt 0, given those before it

A model that does not load is a result too: `error` holds what the user would read.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e.support.server import ENVIRONMENT, resident_bytes

REPOSITORY = Path(__file__).resolve().parents[3]
A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
OFFLINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}


@dataclass
class Result:
    """`top` are the most likely tokens at the same positions as `logprobs`; `resident` is the
    memory of the process with the model in it, mapped files apart, in bytes. `pooled` are
    the vectors of vLLM's pooler, or matrices for tasks of tokens, before any activation."""

    logprobs: list[list[float]] = field(default_factory=list)
    top: list[list[int]] = field(default_factory=list)
    generated: list[list[int]] = field(default_factory=list)
    pooled: list[Any] = field(default_factory=list)
    error: str = ""
    resident: int = field(default=0, compare=False)


class Engine:
    """A child process that runs one model at a time; `env` adds to its environment, `flags` are
    the interpreter's."""

    def __init__(self, env: dict[str, str] | None = None, flags: tuple[str, ...] = ()) -> None:
        self.flags = flags
        self.environment = {**os.environ, **ENVIRONMENT, **OFFLINE, **(env or {})}
        self._log = Path(tempfile.mkstemp(prefix="vllm-engine-", suffix=".log")[1])

    @property
    def log(self) -> str:
        """Everything the process and its workers have printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Engine:
        jobs, self._jobs = os.pipe()
        self._answers, answers = os.pipe()
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *self.flags,
                    "-m",
                    __name__,
                    str(jobs),
                    str(answers),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=REPOSITORY,
                pass_fds=(jobs, answers),
            )
        os.close(jobs)
        os.close(answers)
        self._reader = os.fdopen(self._answers, encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        os.close(self._jobs)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.close()
        self._log.unlink(missing_ok=True)

    def run(
        self,
        model: str | Path,
        prompts: list[list[int]],
        *,
        env: dict[str, str] | None = None,
        tokens: int = 1,
        task: str = "",
        reload: str | Path = "",
        **options: Any,
    ) -> Result:
        """Load a model, score the prompts and continue them greedily, or pool them as a `task` of
        vLLM's pooling runner does; `options` are `LLM`'s, and two ranks have a core each. `reload`:
        a directory whose weights take the place of the model's before anything is asked."""
        parallel = {"tensor_parallel_size", "pipeline_parallel_size"} & options.keys()
        apart = A_CORE_EACH if any(options[name] > 1 for name in parallel) else {}
        env = {**apart, **(env or {})}
        job = {"model": str(model), "prompts": prompts, "env": env, "tokens": tokens}
        job |= {"task": task, "reload": str(reload)}
        line = json.dumps({**job, "options": options}) + "\n"
        with suppress(BrokenPipeError):  # it died before: no answer comes, and the log says why
            os.write(self._jobs, line.encode())
        answer = self._reader.readline()
        if not answer:
            tail = "\n".join(self.log.splitlines()[-60:])
            raise RuntimeError(f"the engine process died:\n{tail}")
        return Result(**json.loads(answer))


def _work(jobs: int, answers: int) -> None:
    with os.fdopen(jobs) as lines, os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(_run(json.loads(line))) + "\n")
            out.flush()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    import gc

    kept = dict(os.environ)
    os.environ.update(job["env"])
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry
    from vllm.v1.engine import core
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker import gpu_worker

    # vLLM asks each class what it can do in a process of its own, lest a GPU be initialized: the
    # import of vLLM again, for every architecture.
    registry._run_in_subprocess = lambda ask: ask()
    # So does each rank: they are copies of one process that has made the imports.
    multiproc_executor.get_mp_context = _ranks
    # Ten collections a model would look through all that these imports have made, most of the time
    # that a small model takes. vLLM freezes its model, too, and takes all back at the end.
    core.freeze_gc_heap = gpu_worker.freeze_gc_heap = gc.unfreeze = lambda: None
    if not gc.get_freeze_count():
        gc.freeze()
    options = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 64,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        **job["options"],
    }
    llm: Any = None
    try:
        if job["task"]:
            llm = LLM(job["model"], runner="pooling", **options)
            scored = _pool(llm, job["prompts"], job["task"])
        else:
            llm = LLM(job["model"], **options)
            if job["reload"]:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
            scored = _score(llm, job["prompts"], job["tokens"])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading needed for a moment and nobody holds now
        return {**scored, "resident": resident_bytes(os.getpid())}
    except Exception as problem:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(problem).__name__}: {problem}"}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ.clear()
        os.environ.update(kept)


def _ranks() -> Any:
    """Of ranks: started as always, in this process's environment, but for the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.v1.worker.cpu_worker"])

    def rank(*, target: Any, **options: Any) -> Any:
        held = partial(_with_environment, dict(os.environ), target)
        return ForkServerProcess(target=held, **options)

    context.Process = rank  # type: ignore[assignment, method-assign]
    return context


def _with_environment(environment: dict[str, str], target: Any, **arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(**arguments)


def _score(llm: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0, max_tokens=tokens, prompt_logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    logprobs, top = [], []
    for output in outputs:
        entries = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]
        logprobs.append([entry[token].logprob for token, entry in entries])
        top.append([next(t for t, p in entry.items() if p.rank == 1) for _, entry in entries])
    return {
        "logprobs": logprobs,
        "top": top,
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
    }


def _pool(llm: Any, prompts: list[list[int]], task: str) -> dict[str, Any]:
    from vllm import PoolingParams

    outputs = llm.encode(
        [{"prompt_token_ids": p} for p in prompts],
        pooling_params=PoolingParams(use_activation=False),
        pooling_task=task,
        use_tqdm=False,
    )
    return {"pooled": [output.outputs.data.float().tolist() for output in outputs]}


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]))

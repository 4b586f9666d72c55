"""Several processes that train one student, each on its share of every batch.

    torchrun --nproc-per-node 2 -m vllm_compress.cli recover DIR --teacher MODEL -o OUT

Each has the whole student, or with `shard` a share of it (`shards.py`). Gradients are averaged
(DistributedDataParallel), so a step is that of one process with the whole batch. The first one
writes text, checkpoints and the result (`system/processes.py`).

Fails where: the student does not fit into the memory of each and is not divided. Answers of
different lengths count a little more in shares with fewer of them.
"""

from __future__ import annotations

from compress_methods.conversion.running import Running
from compress_methods.errors import RecipeError
from compress_methods.recipe.training import Training
from compress_methods.system.processes import count_of


def join(settings: Training, running: Running) -> Running:
    """Meet the other processes. `RecipeError` where they cannot share the training."""
    require_shared(settings, count_of())
    running = running.joined()
    if running.processes.count > 1:
        from accelerate import PartialState  # an extra, and only for several processes

        PartialState(cpu=running.device.type == "cpu")
    return running


def require_shared(settings: Training, count: int) -> None:
    """`RecipeError` where so many processes cannot share a training."""
    if count < 1:
        raise RecipeError(f"processes is {count}, expected 1 or more")
    if settings.batch % count:
        raise RecipeError(f"batch is {settings.batch}, expected a multiple of {count} processes")
    if settings.shard and count == 1:
        raise RecipeError(
            "shard divides a training among processes, and there is 1; start it with torchrun "
            "(check: --processes N)"
        )

"""Run by torchrun: a training with `shard`, then a recipe that trains, both of which die on the way
and are started again; each process says what it did and held.

    torchrun ... -m ...sharing STUDENT TEACHER TEXT SETTINGS RECIPE OUT
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

from compress_methods import convert, recover
from compress_methods.recipe.training import Training
from compress_methods.training import trainer
from compress_methods.training.staged import Trained
from tests.unit.compress_methods.training.killed import Killed, dying

LARGE = 4096


def main(student: str, teacher: str, text: str, settings: str, recipe: str, out: str) -> None:
    steps: list[int] = []
    segments: list[int] = []
    held: dict[str, int] = {}
    die, segment = dying(steps, 3), Trained._segment

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        held.update(_held(given["model"], given["optimizer"]))
        if state.global_step == args.max_steps:
            _spoil(given["model"])  # so that the last step is not the best
        die(self, args, state, control, **given)

    def dying_segment(self: Any, journal: Any, number: int) -> None:
        if self._name(number) not in journal.finished:
            segments.append(number)
            if segments == [0, 1, 2]:
                raise Killed
        segment(self, journal, number)

    given = Training("distill", data=text, shard=True, **json.loads(settings))
    common: dict[str, Any] = {"device": "cpu", "quiet": True}
    with patch.object(trainer._Watcher, "on_step_end", on_step_end):
        _twice(lambda: recover(student, teacher, f"{out}/shared", given, **common))
    with patch.object(Trained, "_segment", dying_segment):
        _twice(lambda: convert(teacher, recipe, f"{out}/staged", calibration=text, **common))
    told = [None] * 2
    torch.distributed.all_gather_object(told, {"steps": steps, "segments": segments, **held})
    if torch.distributed.get_rank() == 0:
        print(json.dumps(told))


def _twice(call: Callable[[], Any]) -> None:
    """The first time it dies."""
    with pytest.raises(Killed):
        call()
    call()


@torch.no_grad()
def _spoil(lesson: Any) -> None:
    for parameter in lesson.parameters():
        parameter.mul_(3)


def _held(lesson: Any, optimizer: Any) -> dict[str, int]:
    """Numbers of this process: of what it trains, of moments, and of all its large tensors of
    floats."""
    moved = [_own(one) for one in lesson.parameters() if one.requires_grad]
    state = [_own(t) for one in optimizer.state.values() for t in one.values() if t.dim()]
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not isinstance(one, DTensor):
            size = one.untyped_storage().nbytes() // 4
            if one.is_floating_point() and size > LARGE:
                found[one.untyped_storage().data_ptr()] = size
    return {"moved": _count(moved), "moments": _count(state), "everything": sum(found.values())}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _count(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


if __name__ == "__main__":
    main(*sys.argv[1:])

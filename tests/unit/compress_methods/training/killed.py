"""Trainings that are killed at a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress_methods.training import trainer


class Killed(BaseException):
    """Nothing may catch it."""


def dying(steps: list[int], count: int) -> Callable[..., None]:
    """In place of the trainer's `on_step_end`: notes every step in `steps`, and dies when they are
    `count`."""
    original = trainer._Watcher.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == count:
            raise Killed
        original(self, args, state, control, **given)

    return on_step_end

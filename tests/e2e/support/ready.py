"""Waiting for a process to serve."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


class ServerError(RuntimeError):
    """The server did not come up; the message ends with its log."""


def wait_until_ready(
    process: subprocess.Popen[bytes],
    name: str,
    ready: Callable[[], Any],
    log: Callable[[], str],
    seconds: float,
    pause: float = 0.1,
    not_yet: tuple[type[Exception], ...] = (OSError,),
) -> None:
    """Return once `ready` raises none of `not_yet`; `ServerError` with the log when the process
    ends first or takes longer than `seconds`.

    Imports nothing of ours: the engine of a vLLM that has never heard of us comes through here.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"{name} exited with {process.returncode}:\n{log()}")
        try:
            ready()
            return
        except not_yet:
            time.sleep(pause)
    raise ServerError(f"{name} was not ready in {seconds:.0f} s:\n{log()}")

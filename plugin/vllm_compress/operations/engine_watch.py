"""Ends a server whose engine process has died, where vLLM would wait on.

vLLM notices by itself where the engine says that it fails. One that is killed (by Linux for its
memory, mostly) or crashes while the server waits for its last word leaves a server that hangs for
ten minutes, or answers no request. A thread waits for the end of every engine process, gives vLLM
time to leave in its own way, then ends all that is left with exit code 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from multiprocessing import connection, process

import psutil

ENGINE = "EngineCore"
"""What vLLM's names of engine processes begin with."""
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.5
PR_SET_CHILD_SUBREAPER = 36
_engines: dict[int, process.BaseProcess] = {}
_asked: set[int] = set()
"""Seen so far, by sentinel, and those that were asked to end."""


def watch_engine(grace: float = GRACE_SECONDS) -> None:
    """Watch from now on, until the process ends."""
    # Workers of an engine that was killed become this process's children, to be found then.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    threading.Thread(target=_watch, args=(grace,), name="watch-engine", daemon=True).start()


def exit_code() -> int:
    """What a server that has ended should say: 1 if its engine failed before it was asked to end.
    vLLM's own says 0 then, and nothing would start it again."""
    by_itself = (engine for sentinel, engine in _engines.items() if sentinel not in _asked)
    return int(any(_code(engine) for engine in by_itself))


def _note_when_asked(engine: process.BaseProcess) -> None:
    """vLLM ends engines that live with `terminate`, and kills them if they take long: what their
    exit says then is nothing."""
    end = engine.terminate

    def terminate() -> None:
        _asked.add(engine.sentinel)
        end()

    engine.terminate = terminate  # type: ignore[method-assign]


def _code(engine: process.BaseProcess) -> int | None:
    try:
        return engine.exitcode
    except ValueError:  # vLLM has closed it
        return None


def _watch(grace: float) -> None:
    while not (ended := _ended()):
        time.sleep(POLL_SECONDS)
    time.sleep(grace)
    print(
        f"vllm-compress: error: the engine ({', '.join(ended)}) has ended and the server has not "
        "noticed; the log above may say why, or the system's, if memory ran out",
        file=sys.stderr,
        flush=True,
    )
    _kill_children()
    os._exit(1)


def _ended() -> list[str]:
    """Names of the engine processes that are no more, unasked. Their sentinels are only looked at:
    waiting for the processes is vLLM's."""
    # multiprocessing has no public list that does not reap.
    for child in list(process._children):  # type: ignore[attr-defined]
        if child.name.startswith(ENGINE):
            if child.sentinel not in _engines:
                _note_when_asked(child)
            _engines[child.sentinel] = child
    ready = connection.wait(list(_engines.keys() - _asked), timeout=0)
    return [_engines[sentinel].name for sentinel in ready if isinstance(sentinel, int)]


def _kill_children() -> None:
    """Workers of the engine among them."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()

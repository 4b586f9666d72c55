"""A server does not outlive its engine."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

SERVER = """
import multiprocessing, os, subprocess, sys, time
from vllm_compress.operations.engine_watch import watch_engine

def engine(end):
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **silent)
    print(worker.pid, flush=True)
    time.sleep(0.3)
    os.kill(os.getpid(), 9) if end else time.sleep(60)

if __name__ == "__main__":
    name, end, seconds = sys.argv[1], sys.argv[2] == "dies", float(sys.argv[3])
    watch_engine(grace=1)
    process = multiprocessing.get_context("fork").Process(target=engine, args=(end,), name=name)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
"""


def serve(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SERVER, *arguments], capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic() - start


def lives(pid: int) -> bool:
    """Whether it is more than an entry that nobody has read."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_waits_for_a_dead_engine_is_ended() -> None:
    done, seconds = serve("EngineCore_DP0", "dies", "50")
    assert done.returncode == 1
    assert seconds < 30
    said = "vllm-compress: error: the engine (EngineCore_DP0) has ended and the server has not"
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr
    assert not lives(int(done.stdout))


@pytest.mark.parametrize(("name", "end"), [("EngineCore", "lives"), ("ApiServer_0", "dies")])
def test_other_servers_end_as_they_like(name: str, end: str) -> None:
    """One that lives, one whose other helpers die, and so one that leaves within the time given."""
    done, seconds = serve(name, end, "3")
    assert done.returncode == 0
    assert seconds >= 3
    assert done.stderr == ""
    for pid in map(int, done.stdout.split()):
        psutil.Process(pid).kill()


def test_one_that_leaves_in_time_keeps_its_own_exit_code() -> None:
    done, _ = serve("EngineCore", "dies", "0.8")
    assert done.returncode == 0
    assert done.stderr == ""
    for pid in map(int, done.stdout.split()):
        psutil.Process(pid).kill()


ENDING = """
import multiprocessing, os, signal, sys, time
from vllm_compress.operations.engine_watch import exit_code, watch_engine
asked = sys.argv[2] == "asked"

def engine(end):
    if asked:
        signal.signal(signal.SIGTERM, lambda *_: None)
    time.sleep(60 if asked else 0.7)
    os._exit(-end) if end <= 0 else os.kill(os.getpid(), end)

if __name__ == "__main__":
    watch_engine()
    process = multiprocessing.get_context("fork").Process(
        target=engine, args=(int(sys.argv[1]),), name="EngineCore_DP0"
    )
    process.start()
    if asked:
        time.sleep(1)
        process.terminate()
        os.kill(process.pid, int(sys.argv[1]))
    process.join()
    sys.exit(exit_code())
"""


@pytest.mark.parametrize(("end", "code"), [(9, 1), (11, 1), (-1, 1), (15, 1), (0, 0)])
def test_a_server_whose_engine_fails_says_so_to_what_started_it(end: int, code: int) -> None:
    """vLLM's server ends with 0 after its engine was killed. `end`: a signal, or less an exit."""
    command = [sys.executable, "-c", ENDING, str(end), "alone"]
    assert subprocess.run(command, timeout=60, check=False).returncode == code


def test_an_engine_that_was_asked_to_end_may_be_killed_for_being_slow() -> None:
    """As vLLM does at once."""
    command = [sys.executable, "-c", ENDING, "9", "asked"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0

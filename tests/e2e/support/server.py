"""The real vLLM OpenAI server as a subprocess, for tests.

    with VllmServer(model_dir) as server:
        OpenAI(base_url=f"{server.url}/v1", api_key="none")

Eager, one GiB of KV cache, short contexts: what starts quickest on two cores. Fails with the end of
the server's log in the message when it dies or is not ready in time; `log` is the whole of it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from types import TracebackType

from tests.e2e.support.ready import ServerError, wait_until_ready

START_SECONDS = 240.0
DEFAULTS = {
    "--host": "127.0.0.1",
    "--max-model-len": "512",
    "--max-num-seqs": "32",
    "--enforce-eager": None,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
# The worker within the engine's process, where vLLM gives it one of its own: a third less to start.
# For tests with several servers; those of the plugin itself start vLLM as it is.
FEWER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def resident_bytes(pid: int) -> int:
    """Memory of a process that no file backs, as the kernel counts it."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


class VllmServer:
    """Starts on entering the `with` block, stops on leaving it. `args` override the defaults;
    `--compile`, which is ours, leaves out `--enforce-eager`."""

    def __init__(
        self, model_dir: str | Path, *args: str, env: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", str(model_dir), "--port", str(self.port)]
        for flag, value in DEFAULTS.items():
            if flag not in args and not (flag == "--enforce-eager" and "--compile" in args):
                self.command += [flag] if value is None else [flag, value]
        self.command += [arg for arg in args if arg != "--compile"]
        eager = {} if "--compile" in args else {"TORCHDYNAMO_DISABLE": "1"}
        self.environment = {**os.environ, **ENVIRONMENT, **eager, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.mkstemp(prefix="vllm-server-", suffix=".log")[1])

    @property
    def log(self) -> str:
        """Everything the server has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> VllmServer:
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()
        self._log.unlink(missing_ok=True)

    def signal(self, number: signal.Signals) -> None:
        """Send one to the server and the workers it started."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def fails(self) -> str:
        """Start a server that is expected not to come up; its log."""
        try:
            with self:
                raise AssertionError("the server came up")
        except ServerError:
            return self.log

    def get(self, path: str) -> str:
        """Body of a GET request, such as `/metrics`."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def _wait(self) -> None:
        assert self._process is not None
        ready = partial(self.get, "/health")
        wait_until_ready(self._process, "vLLM", ready, self._tail, START_SECONDS, pause=0.3)

    def _tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the server and the workers it started, which share its process group."""
        process = self._process
        if process is None:
            return
        self._process = None
        for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()

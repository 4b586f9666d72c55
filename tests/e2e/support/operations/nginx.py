"""The real nginx as a gateway in front of small HTTP servers or vLLM, for tests.

with Nginx(folder) as gateway, Upstream("full") as full:
    assert gateway.ask("/v1/models", user="a").variant == "full"
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from types import TracebackType

import pytest

from compress_methods.errors import CompressError
from tests.conftest import REPOSITORY
from tests.e2e.support.ready import wait_until_ready
from vllm_compress.operations.gateway.control import find_nginx
from vllm_compress.operations.gateway.nginx import gateway_url

START_SECONDS = 20.0


def nginx_program() -> str:
    """Path of nginx; skips the test where there is none."""
    try:
        return find_nginx()
    except CompressError as problem:
        pytest.skip(str(problem))


@dataclass(frozen=True)
class Reply:
    """What a client got."""

    status: int
    variant: str | None
    body: str


class Nginx:
    """nginx with the configuration in `folder`, while the `with` block lasts."""

    def __init__(self, folder: Path, command: list[str] | None = None) -> None:
        self.folder = folder
        self.command = command or [nginx_program(), "-p", str(folder), "-c", "nginx.conf"]
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What nginx has printed: its access and error logs."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Nginx:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as out:
            self._process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop()

    def ask(
        self,
        path: str = "/v1/x",
        *,
        user: str | None = None,
        key: str | None = None,
        body: bytes | None = b"",
    ) -> Reply:
        """POST, or GET where `body` is None; any status is an answer."""
        headers = {"X-User-Id": user, "Authorization": key}
        sent = {name: value for name, value in headers.items() if value is not None}
        request = urllib.request.Request(f"{self.url}{path}", body, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(answer.status, answer.headers["X-Variant"], answer.read().decode())
        except urllib.error.HTTPError as problem:
            return Reply(problem.code, problem.headers["X-Variant"], problem.read().decode())

    def variants(self, users: range) -> list[str | None]:
        """Which variant answers each user."""
        return [self.ask(user=f"user-{i}").variant for i in users]

    def _wait(self) -> None:
        assert self._process is not None

        def ready() -> None:
            self.url = gateway_url(self.folder)
            urllib.request.urlopen(f"{self.url}/healthz", timeout=5).close()

        wait_until_ready(
            self._process,
            "nginx",
            ready,
            lambda: self.log,
            START_SECONDS,
            not_yet=(OSError, CompressError),  # before nginx has written where it listens
        )

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Upstream:
    """An HTTP server that answers with its name and its request's body.

    The body `hang up` ends the connection without an answer, `fail` is answered 500, as all are
    once it is `draining`, `refuse` 401. `stream` sends a line, then a second one as soon as
    `go_on` is set. An answer takes `seconds`; `authorization` is that of the last request.
    """

    def __init__(self, name: str, seconds: float = 0) -> None:
        self.name, self.seconds = name, seconds
        self.authorization: str | None = None
        self.requests = self.running = 0
        self.draining = False
        self.go_on = threading.Event()
        self._connections: list[socket] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Upstream:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all connections and refuse new ones."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 65536  # an answer goes out whole, or not at all

            def setup(self) -> None:
                super().setup()
                upstream._connections.append(self.connection)

            def do_GET(self) -> None:
                """/metrics as vLLM's, which count the requests that are being answered."""
                answer = f"vllm:num_requests_running {upstream.running}\n".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_POST(self) -> None:
                upstream.running += 1
                try:
                    self._post()
                finally:
                    upstream.running -= 1

            def _post(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                upstream.requests += 1
                upstream.authorization = self.headers["Authorization"]
                time.sleep(upstream.seconds)
                if body == b"hang up":
                    self.close_connection = True
                    return
                failed = body == b"fail" or upstream.draining
                self.send_response(500 if failed else 401 if body == b"refuse" else 200)
                self.send_header("X-Variant", "an upstream's own word")
                if body == b"stream":
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self._chunk(b"first\n")
                    upstream.go_on.wait(30)
                    self._chunk(b"second\n")
                    self._chunk(b"")
                    return
                answer = f"{upstream.name} {len(body)}".encode()
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class UpstreamProcess:
    """An `Upstream` in a process of its own, to be sent signals. On SIGTERM it drains as vLLM does:
    finishes what it has, answers new requests 500, and ends after a second."""

    def __init__(self, name: str, seconds: float) -> None:
        command = [sys.executable, "-m", "tests.e2e.support.operations.nginx", name, str(seconds)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # clients that went away
            text=True,
            cwd=REPOSITORY,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def __enter__(self) -> UpstreamProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Stream:
    """A request whose answer is read line by line."""

    def __init__(self, gateway: Nginx, user: str) -> None:
        self._connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)
        self._connection.request("POST", "/v1/x", b"stream", {"X-User-Id": user})
        self._answer = self._connection.getresponse()

    def line(self) -> str:
        """The next line; empty at the end."""
        return self._answer.readline().decode().strip()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with Upstream(sys.argv[1], float(sys.argv[2])) as served:
        print(served.address, flush=True)
        signal.sigwait({signal.SIGTERM})
        served.draining = True
        time.sleep(1)

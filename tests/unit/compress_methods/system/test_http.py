"""A request gives a JSON object, or one line that says what was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from compress_methods.errors import CompressError
from compress_methods.system.http import headers, request_json


class Refused(CompressError):
    """What the tests ask for."""


class Handler(BaseHTTPRequestHandler):
    """Answers what a test has put there; keeps what it was asked."""

    status: int
    content: bytes
    asked: list[tuple[str, dict[str, str], bytes]]
    release: threading.Event

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/answer")
            self.end_headers()
            return
        if self.path == "/slow":
            self.release.wait(30)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.command, dict(self.headers), body))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    do_POST = do_GET


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    found = {"status": 200, "content": b"{}", "asked": [], "release": threading.Event()}
    handler = type("Handler", (Handler,), found)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        handler.release.set()
        running.shutdown()
        thread.join()


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = 10) -> dict[str, Any]:
    return request_json(url, body, timeout=timeout, error_class=Refused)


def error_of(url: str, timeout: float = 10) -> str:
    with pytest.raises(Refused) as caught:
        ask(url, timeout=timeout)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{url}: ")
    return text.removeprefix(f"{url}: ")


def test_an_object_is_sent_and_another_returned(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.content = json.dumps({"é": [1, None]}).encode()
    assert ask(f"{url}/answer", {"prompt": [1, 2], "é": 0.5}) == {"é": [1, None]}
    method, sent, body = handler.asked[0]
    assert method == "POST"
    assert sent["Content-Type"] == "application/json"
    assert json.loads(body) == {"prompt": [1, 2], "é": 0.5}


def test_without_a_body_it_is_a_get(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    ask(f"{url}/answer")
    assert handler.asked[0][0] == "GET"
    assert handler.asked[0][2] == b""


def test_redirects_are_followed(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.content = b'{"here": 1}'
    assert ask(f"{url}/moved") == {"here": 1}


def test_the_key_is_sent_where_there_is_one(
    server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    ask(f"{url}/answer")
    assert "Authorization" not in headers()
    assert "Authorization" not in handler.asked[0][1]
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    ask(f"{url}/answer")
    assert handler.asked[1][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (400, b'{"error": {"message": "too\\nlong"}}', "HTTP 400: too long"),
        (
            401,
            b'{"error": "Unauthorized key"}',
            "HTTP 401: Unauthorized key; VLLM_API_KEY, which is sent as the server's key, "
            "is not set",
        ),
        (404, b'{"object": "error", "message": "no such model"}', "HTTP 404: no such model"),
        (404, b'{"detail": "Not Found"}', "HTTP 404: Not Found"),
        (502, b"<html>\nnginx</html>", "HTTP 502: Bad Gateway"),
        (500, b"[1]", "HTTP 500: Internal Server Error"),
        (503, b"", "HTTP 503: Service Unavailable"),
        (304, b"", "HTTP 304: Not Modified"),
    ],
)
def test_a_refusal_says_what_the_server_says(
    server: tuple[str, type[Handler]], status: int, content: bytes, said: str
) -> None:
    url, handler = server
    handler.status, handler.content = status, content
    assert error_of(f"{url}/answer") == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "answered list, expected a JSON object"),
        (b"null", "answered NoneType, expected a JSON object"),
        (b"<html>\n", "no answer from a vLLM server (Expecting value: line 1 column 1 (char 0))"),
        (b'{"a": "\xff"}', "no answer from a vLLM server ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_no_json_object_is_said(
    server: tuple[str, type[Handler]], content: bytes, said: str
) -> None:
    url, handler = server
    handler.content = content
    assert error_of(f"{url}/answer").startswith(said)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/v1/models", "Connection refused"),
        ("ftp://localhost/v1/models", "unsupported protocol"),
        ("localhost:9/v1/models", "missing an 'http://' or 'https://' protocol"),
        ("http://[::1/v1/models", "Invalid"),
        ("http://host:port/v1/models", "Invalid port"),
    ],
)
def test_where_nobody_answers_the_reason_is_said(url: str, reason: str) -> None:
    text = error_of(url)
    assert text.startswith("no answer from a vLLM server (")
    assert reason in text


def test_a_server_that_takes_too_long_is_given_up(server: tuple[str, type[Handler]]) -> None:
    url, _ = server
    assert error_of(f"{url}/slow", timeout=0.2) == "no answer from a vLLM server (timed out)"


def test_importing_it_loads_no_http_library() -> None:
    code = "import sys, compress_methods.system.http; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

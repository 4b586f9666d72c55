"""Every failure of a request is one line that names the address and the server's own words."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from compress_methods.system.http import HttpError, fetch, refusal
from vllm_compress.operations.prometheus import Prometheus, scrape


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        found = {"/metrics": (200, b'a_total{b="c"} 2\n'), "/broken": (200, b"short")}
        if self.path.startswith("/prefix/api/v1/query?query=a%2Bb"):
            value = {"metric": {"who": self.headers["Authorization"]}, "value": [0, "1.5"]}
            data = json.dumps({"data": {"resultType": "vector", "result": [value]}})
            found[self.path] = (200, data.encode())
        status, content = found.get(self.path, (418, b'{"error": {"message": "a\\n teapot"}}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + 9 * (self.path == "/broken")))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_refusals_carry_status_and_words(url: str) -> None:
    with pytest.raises(HttpError) as caught:
        fetch(f"{url}/x")
    assert str(caught.value) == f"{url}/x: HTTP 418: a teapot"
    assert (caught.value.status, caught.value.what) == (418, "HTTP 418: a teapot")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "nowhere", "http://[", "{url}/broken"])
def test_no_whole_answer_is_one_line(url: str, address: str) -> None:
    with pytest.raises(HttpError, match="no answer") as caught:
        fetch(address.format(url=url))
    assert caught.value.status is None
    assert "\n" not in str(caught.value)


def test_samples_of_a_server(url: str) -> None:
    (sample,) = scrape(url)
    assert (sample.name, sample.labels, sample.value) == ("a_total", {"b": "c"}, 2)


def test_credentials_and_prefix_of_a_prometheus(url: str) -> None:
    prometheus = Prometheus(url.replace("//", "//me:a%40b@") + "/prefix/")
    assert prometheus.url == f"{url}/prefix"
    (sample,) = prometheus.query("a+b")
    assert sample.labels == {"who": "Basic bWU6YUBi"}
    assert sample.value == 1.5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"message": "too long"}, "too long"),
        ({"error": "parse error", "status": "error"}, "parse error"),
        ({"detail": "Not Found"}, "Not Found"),
    ],
)
def test_reasons_of_several_servers(content: dict, said: str) -> None:
    assert refusal(json.dumps(content).encode()) == said

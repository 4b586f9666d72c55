"""Requests over HTTP, to servers that speak as vLLM's do among others; every failure is one line.

`fetch` opens a connection for each request: workers of a reloaded nginx that are on their way out
would keep answering on an old one. Give an `httpx.Client` of your own to keep connections open.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.lazy import httpx

TIMEOUT = 10.0
KEY_VARIABLE = "VLLM_API_KEY"
REFUSED = (401, 403)


class HttpError(CompressError):
    """No answer, `status` None; or one with another status than 200. `what` leaves the URL out."""

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        self.what = f"no answer ({reason})" if status is None else f"HTTP {status}: {reason}"
        self.status = status
        super().__init__(f"{url}: {self.what}")


@contextmanager
def stream(
    url: str, body: Any = None, *, client: httpx.Client | None = None, **options: Any
) -> Iterator[httpx.Response]:
    """Send a GET, or POST `body` as JSON; the answer's content is still to be read. `options` are
    httpx's. Raises `HttpError`, also where the content breaks off."""
    method, client = "GET" if body is None else "POST", client or _client()
    try:
        with client.stream(method, url, json=body, **options) as response:
            if response.status_code != 200:
                said = refusal(response.read()) or response.reason_phrase
                raise HttpError(url, said, response.status_code)
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise HttpError(url, str(problem) or type(problem).__name__) from problem


def fetch(url: str, body: Any = None, **options: Any) -> httpx.Response:
    """Send a request as `stream` does and read the answer to its end."""
    with stream(url, body, **options) as response:
        response.read()
    return response


def headers() -> dict[str, str]:
    """Of a request to vLLM's server; with the key in VLLM_API_KEY, where it looks for it too."""
    key = os.environ.get(KEY_VARIABLE)
    return {
        "Content-Type": "application/json",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }


def request_json(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    error_class: type[CompressError],
) -> dict[str, Any]:
    """GET, or POST of `body`, both JSON objects; raises `error_class`.

    `timeout` is the longest wait for the connection, and for any piece of the answer.
    """
    try:
        value = fetch(url, body, headers=headers(), timeout=timeout).json()
    except HttpError as problem:
        reason = problem.what.replace("no answer (", "no answer from a vLLM server (")
        if problem.status in REFUSED:
            held = "holds another key" if os.environ.get(KEY_VARIABLE) else "is not set"
            reason += f"; {KEY_VARIABLE}, which is sent as the server's key, {held}"
        raise error_class(f"{url}: {reason}") from problem
    except ValueError as problem:
        raise error_class(f"{url}: no answer from a vLLM server ({problem})") from problem
    if not isinstance(value, dict):
        raise error_class(f"{url}: answered {type(value).__name__}, expected a JSON object")
    return value


def refusal(content: bytes) -> str:
    """Find a server's reason: vLLM's `error.message`, Prometheus' `error`, a framework's `detail`,
    else a text's beginning; empty where it is a page or says nothing."""
    try:
        block = json.loads(content)
        error = block.get("error", block)
        said = error if isinstance(error, str) else error.get("message") or error["detail"]
    except (KeyError, TypeError, AttributeError):
        said = ""
    except ValueError:
        text = content.decode(errors="replace").strip()
        said = "" if text.startswith("<") else text[:200]
    return " ".join(str(said).split())


@functools.cache
def _client() -> httpx.Client:
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=TIMEOUT, limits=limits, follow_redirects=True)

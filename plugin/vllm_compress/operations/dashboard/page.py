"""The page: one HTML file that needs nothing else, served beside its data or with it inside."""

from __future__ import annotations

import json
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from compress_methods.errors import CompressError
from vllm_compress.operations.dashboard.collect import collect
from vllm_compress.operations.prometheus import Prometheus

WEB = Path(__file__).parent / "web"
# In the order they run: each may use what stands in those before it.
SCRIPTS = ("chart.js", "state.js", "panels.js", "tables.js", "page.js")
LONGEST_SECONDS = 366 * 86400.0


def render(data: dict[str, Any] | None = None) -> str:
    """The page with `data` of `collect` inside; without, it asks its server for it."""
    # No `<` may stand in a script, or a label could end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _shell().replace("{data}", text)


@cache
def _shell() -> str:
    page = (WEB / "page.html").read_text(encoding="utf-8")
    css = (WEB / "page.css").read_text(encoding="utf-8")
    scripts = [(WEB / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return page.replace("/*{css}*/", css).replace("/*{js}*/", "\n".join(scripts))


def serve(prometheus: Prometheus, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, bound (port 0: to any) but not yet running."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/":
                self._answer(200, "text/html", render())
            elif url.path == "/data":
                self._answer(200, "application/json", json.dumps(self._data(url.query)))
            else:
                self._answer(404, "text/plain", "not found\n")

        def _data(self, query: str) -> dict[str, Any]:
            try:
                seconds = float(parse_qs(query)["seconds"][0])
            except (KeyError, ValueError):
                seconds = 0.0
            if not 0 < seconds <= LONGEST_SECONDS:
                return {"error": "seconds is not a number from 1 to a year's"}
            try:
                return collect(prometheus, seconds)
            except CompressError as problem:
                return {"error": str(problem)}

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """One line per request would hide what matters."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as problem:
        raise CompressError(f"cannot listen on {host}:{port}: {problem}") from problem

"""A server that speaks OpenAI's protocol, for what real ones do not do on demand: limit rates, be
slow, die in the middle of a run, not know an option.

What it answers to the last message, or to a prompt, is `answer`, the same whenever it is asked, but
that a number counts how often it was.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from tests.unit.vllm_compress.operations.mortal_server import MortalHandler

Answer = Callable[[str, int], str]


class Server(ThreadingHTTPServer):
    """`first` statuses are answered before any other; with `dies_after` so many completions every
    connection is cut. `seen` has the body of every completion that was answered, `asked` when each
    request came, whatever came of it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer = answer
        self.models = ["m"]
        self.owner = "vllm"
        self.first: deque[tuple[int, str | None]] = deque()
        self.seen: list[dict[str, Any]] = []
        self.asked: list[float] = []
        self.keys: set[str | None] = set()
        self.key: str | None = None
        self.counts: Counter[str] = Counter()
        self.dies_after = -1
        self.delay = 0.0
        self.holds_after = math.inf  # answers; who asks then waits for `going`, and gets none
        self.going = threading.Event()
        self.usage = True
        self.unknown: tuple[str, ...] = ()
        self.refuses = ""
        self.cuts = ""
        self.running = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        pass  # clients that went away

    def questions(self) -> list[str]:
        """The last message, or the prompt, of every request that was answered."""
        return [last(body) for body in self.seen]


def last(body: dict[str, Any]) -> str:
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    assert isinstance(text, str)
    return text


class Handler(MortalHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        if self.is_dead(self.server):
            return
        cards = [{"id": name, "owned_by": self.server.owner} for name in self.server.models]
        self._send(200, {"data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.is_dead(self.server):
            return
        with server.lock:
            server.asked.append(time.monotonic())
            status, wait = server.first.popleft() if server.first else (200, None)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            time.sleep(server.delay)
            if len(server.seen) >= server.holds_after:
                server.going.wait()
                return
            self._complete(body, status, wait)
        finally:
            with server.lock:
                server.running -= 1

    def _complete(self, body: dict[str, Any], status: int, wait: str | None) -> None:
        server = self.server
        server.keys.add(self.headers["Authorization"])
        if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
            said = f"{self.headers['Authorization']} is no key of ours"
            return self._send(401, {"error": {"message": said}})
        if status != 200:
            return self._send(status, {"error": {"message": "Later."}}, wait)
        for option in server.unknown:
            if option in body:
                hint = " Use max_completion_tokens." if option == "max_tokens" else ""
                said = f"Unsupported parameter: {option}.{hint}"
                return self._send(400, {"error": {"message": said}})
        question = last(body)
        if server.refuses and server.refuses in question:
            return self._send(400, {"error": {"message": "Not this one."}})
        with server.lock:
            number = server.counts[question]
            server.counts[question] += 1
            server.seen.append(body)
        self._send(200, self._block(body, server.answer(question, number)))

    def _block(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        cut = bool(self.server.cuts) and self.server.cuts in last(body)
        choice: dict[str, Any] = {"finish_reason": "length" if cut else "stop"}
        chat = "messages" in body
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs"):
            top = body["top_logprobs"] if chat else body["logprobs"]
            choice["logprobs"] = logprobs(text, top, chat, "return_tokens_as_token_ids" in body)
        said, heard = len(str(text).split()), len(last(body).split())
        usage = {"prompt_tokens": heard, "completion_tokens": said}
        return {"choices": [choice], **({"usage": usage} if self.server.usage else {})}

    def _send(self, status: int, block: dict[str, Any], wait: str | None = None) -> None:
        data = json.dumps(block).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if wait is not None:
            self.send_header("Retry-After", wait)
        self.end_headers()
        self.wfile.write(data)


def logprobs(text: str, top: int, chat: bool, ids: bool) -> dict[str, Any]:
    """Of every word of the text, as one token each; the k-th likeliest has -k."""
    tokens = text.split()
    tops = [
        {(f"token_id:{i + k}" if ids else f"{token}{k}"): -1.0 - k for k in range(top)}
        for i, token in enumerate(tokens)
    ]
    if chat:
        content = [
            {
                "token": next(iter(one)),
                "logprob": -1.0,
                "top_logprobs": [{"token": t, "logprob": v} for t, v in one.items()],
            }
            for one in tops
        ]
        return {"content": content}
    chosen = [next(iter(one)) for one in tops]
    return {"tokens": chosen, "token_logprobs": [-1.0] * len(tokens), "top_logprobs": tops}


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serve until the block ends; the port is free again then."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

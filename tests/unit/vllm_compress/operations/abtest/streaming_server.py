"""A server that speaks vLLM's streaming protocol, for what real ones do not do on demand: die
in the middle of a run, refuse a prompt, break off.

Its "model" is a table: the next token is drawn from the last one's row, so outputs, tokens and
log-probabilities belong together. `noise` disturbs the table, as compression does.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

import numpy as np

from tests.unit.vllm_compress.operations.mortal_server import MortalHandler

VOCABULARY = 64
Reply = tuple[list[dict[str, Any]], str]


class Server(ThreadingHTTPServer):
    """`dies_after` that many completions every connection is cut; `breaks` streams are cut in the
    middle first, those of `breaks_once` prompts once. `seen` has the body of every completion
    request, `most` those at once. With `joules_per_token` its /metrics count energy of `device`.
    `replies` are what it says in chats instead of the table's tokens: a function from the request
    to the deltas of an answer and its finish reason."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, model: str = "m", noise: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.model, self.root = model, ""
        table = np.random.default_rng(0).normal(0, 2, (VOCABULARY, VOCABULARY))
        table = table + noise * np.random.default_rng(1).normal(size=table.shape)
        self.log_probabilities = table - np.log(np.exp(table).sum(1, keepdims=True))
        self.metrics = ""
        self.joules_per_token = 0.0
        self.device = "gpu-0"
        self.generated = 0
        self.seen: list[dict[str, Any]] = []
        self.dies_after = -1
        self.breaks = 0
        self.score_status = 200
        self.breaks_once: set[str] = set()
        self.vocabulary_offset = 0
        self.delay = 0.0
        self.longest = 500
        self.replies: Callable[[dict[str, Any]], Reply] | None = None
        self.running = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        pass  # clients that went away

    def exposition(self) -> str:
        if not self.joules_per_token:
            return self.metrics
        joules = 1000 + self.generated * self.joules_per_token
        return (
            f"{self.metrics}"
            f'vllm_compress_energy_joules_total{{deployment="d",device="{self.device}"}} {joules}\n'
            f'vllm_compress_generation_tokens_total{{deployment="d"}} {self.generated}\n'
        )

    def tokenize(self, text: str) -> list[int]:
        return [self.vocabulary_offset + 1 + byte % (VOCABULARY - 2) for byte in text.encode()]

    def streamed(self) -> list[dict[str, Any]]:
        return [body for body in self.seen if body.get("stream")]


class Handler(MortalHandler):
    server: Server

    def do_GET(self) -> None:
        if self.is_dead(self.server):
            return
        if self.path == "/metrics":
            self._send(200, self.server.exposition().encode())
        else:
            root = self.server.root or f"/models/{self.server.model}"
            cards = [{"id": self.server.model, "root": root}]
            self._send(200, json.dumps({"data": cards}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_dead(self.server):
            return
        server = self.server
        with server.lock:
            server.seen.append(body)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self._complete(body)
        finally:
            with server.lock:
                server.running -= 1

    def _complete(self, body: dict[str, Any]) -> None:
        server = self.server
        if body["model"] != server.model:
            return self._refuse(404, f"The model `{body['model']}` does not exist.")
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
            (prompt,) = prompt
        tokens = prompt if isinstance(prompt, list) else server.tokenize(prompt)
        if len(tokens) > server.longest:
            return self._refuse(
                400, f"This model's maximum context length is {server.longest} tokens."
            )
        if "prompt_logprobs" in body and server.score_status != 200:
            return self._refuse(server.score_status, "No.")
        if "prompt_logprobs" in body:
            return self._score(tokens, body["prompt_logprobs"])
        time.sleep(server.delay)
        if body.get("stream"):
            return self._stream(body, tokens)
        token = int(server.log_probabilities[tokens[-1] % VOCABULARY].argmax())
        self._send(200, json.dumps({"choices": [{"index": 0, "text": f"{token % 2}"}]}).encode())

    def _stream(self, body: dict[str, Any], tokens: list[int]) -> None:
        server = self.server
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chat, last = "messages" in body, tokens[-1] % VOCABULARY
        if chat:
            role = {"delta": {"role": "assistant", "content": ""}, "index": 0}
            self._event({"choices": [role], "prompt_token_ids": tokens})
        if chat and server.replies:
            return self._reply(*server.replies(body))
        for step in range(body["max_tokens"]):
            if step == 2 and server.breaks > 0:
                server.breaks -= 1
                return
            if step == 2 and body.get("prompt") in server.breaks_once:
                server.breaks_once.remove(body["prompt"])
                return
            last = int(server.log_probabilities[last].argmax())
            with server.lock:
                server.generated += 1
            end = last == 0 or step == body["max_tokens"] - 1
            text = f" {last}"
            choice: dict[str, Any] = {"token_ids": [last], "finish_reason": "stop" if end else None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if step == 0 and not chat:
                choice["prompt_token_ids"] = tokens
            self._event({"choices": [choice]})
            if end:
                break
        self.wfile.write(b"data: [DONE]\n\n")

    def _reply(self, deltas: list[dict[str, Any]], finish: str) -> None:
        for i, delta in enumerate(deltas, 1):
            end = finish if i == len(deltas) else None
            choice = {"delta": delta, "token_ids": [i], "finish_reason": end}
            self._event({"choices": [choice]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _score(self, tokens: list[int], count: int) -> None:
        positions: list[dict[int, Any] | None] = [None]
        for last, target in itertools.pairwise(tokens):
            row = self.server.log_probabilities[last % VOCABULARY]
            top = np.argsort(-row)[: count if count >= 0 else VOCABULARY].tolist()
            positions.append({i: {"logprob": float(row[i])} for i in {*top, target % VOCABULARY}})
        self._send(200, json.dumps({"choices": [{"prompt_logprobs": positions}]}).encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": {"message": message, "code": status}}).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


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

"""Perplexity, KL and agreement are what their definitions say, offline and from a server."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.calibration.text import windows
from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.evaluation import metrics
from compress_methods.evaluation.metrics import Sums, compare_logits, token_kl, token_nll
from compress_methods.evaluation.offline import evaluate, next_token_logits
from compress_methods.evaluation.served import ServerError, evaluate_url, partial_kl

SHORT = "It was a truth universally acknowledged. She was not there, and he said nothing more. " * 8
logits_pairs = st.integers(0, 2**31).map(
    lambda seed: torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(seed)) * 3
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SHORT)
    return path


def test_a_case_worked_by_hand() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    result = compare_logits(base, other, torch.tensor([0, 0])).result()
    # KL of the first row: 0.5 ln 2 - 0.25 ln 2; of the second: 0.
    assert result.kl == pytest.approx(0.25 * math.log(2) / 2)
    assert result.base_perplexity == pytest.approx((0.5 * 0.8) ** -0.5)
    assert result.perplexity == pytest.approx((0.25 * 0.8) ** -0.5)
    assert result.top1_agreement == 0.5
    assert result.tokens == 2
    assert result.kl_kind == "exact"


@given(logits_pairs)
def test_kl_is_the_definition_never_negative_and_blind_to_a_shift(pair: Tensor) -> None:
    base, other = pair
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).float()
    torch.testing.assert_close(token_kl(base, other), expected, rtol=1e-4, atol=1e-6)
    assert (token_kl(base, other) > -1e-6).all()
    torch.testing.assert_close(token_kl(base + 5, other - 5), expected, rtol=1e-3, atol=1e-5)


@given(logits_pairs)
def test_a_model_against_itself_loses_nothing(pair: Tensor) -> None:
    result = compare_logits(pair[0], pair[0], torch.zeros(7, dtype=torch.int64)).result()
    assert result.kl == 0
    assert result.top1_agreement == 1
    assert result.perplexity == result.base_perplexity


@given(logits_pairs, st.integers(1, 6))
def test_sums_of_parts_are_the_sums_of_the_whole(pair: Tensor, cut: int) -> None:
    targets = torch.arange(7)
    whole = compare_logits(*pair, targets)
    parts = compare_logits(*pair[:, :cut], targets[:cut])
    parts += compare_logits(*pair[:, cut:], targets[cut:])
    assert parts.result().to_dict() == pytest.approx(whole.result().to_dict())


def test_chunks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 20
    whole = compare_logits(base, other, targets).result().to_dict()
    nll = token_nll(base, targets)
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 4 * 20 * 7)
    assert compare_logits(base, other, targets).result().to_dict() == pytest.approx(whole)
    torch.testing.assert_close(token_nll(base, targets), nll)


def test_impossible_tokens_count_nothing_unless_the_original_allows_them() -> None:
    base = torch.tensor([[0.0, 0.0, -math.inf]])
    assert token_kl(base, torch.zeros(1, 3)).item() == pytest.approx(math.log(3 / 2))
    assert token_kl(torch.zeros(1, 3), base).item() == math.inf


def test_what_is_not_finite_is_null_in_json() -> None:
    assert Sums(nll=math.inf, tokens=1).result().to_dict()["perplexity"] is None
    assert Sums(kl=math.nan, tokens=1).result().to_dict()["kl"] is None
    assert Sums(nll=1e6, tokens=1).result().perplexity == math.inf


def test_shapes_that_differ_and_no_tokens_are_errors() -> None:
    with pytest.raises(ValueError, match="expected equal"):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="no predicted tokens"):
        Sums().result()


def test_offline_evaluation_of_the_original_is_its_own_perplexity(
    novels_8m: Path, text: Path
) -> None:
    result = evaluate(novels_8m, novels_8m, text, length=32, limit_tokens=80)
    model = load_model(novels_8m)
    ids = torch.tensor(load_tokenizer(novels_8m)(SHORT)["input_ids"][:80])
    losses = [model(input_ids=w[None], labels=w[None]).loss for w in (ids[:32], ids[32:64])]
    last = model(input_ids=ids[None, 64:], labels=ids[None, 64:]).loss
    mean = (31 * losses[0] + 31 * losses[1] + 15 * last).item() / 77
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert (result.kl, result.top1_agreement, result.tokens) == (0, 1, 77)


def test_another_vocabulary_a_long_window_and_missing_models_are_refused(
    novels_8m: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in novels_8m.iterdir():
        (other / path.name).symlink_to(path)
    tokenizer = json.loads((novels_8m / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="2 of 4096 tokens differ"):
        evaluate(other, novels_8m, text)
    with pytest.raises(CalibrationError, match="length is 4096, but novels-8m takes 2048"):
        evaluate(novels_8m, novels_8m, text, length=4096)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        evaluate(tmp_path / "nowhere", novels_8m, text)


@given(logits_pairs, st.integers(1, 32))
def test_kl_over_some_tokens_is_a_lower_bound_and_over_all_exact(pair: Tensor, count: int) -> None:
    base, other = (logits[0].double().log_softmax(-1) for logits in pair)
    top, every = other.topk(count), other.topk(33)
    found = partial_kl(base[top.indices], top.values, whole=False)
    exact = (base.exp() * (base - other)).sum().item()
    assert token_kl(base[None], other[None]).item() == pytest.approx(exact, abs=1e-4)
    assert -1e-6 <= found.least <= exact + 1e-6
    out = torch.ones(33, dtype=torch.bool)
    out[top.indices] = False
    worst = max(0.0, (base - other)[top.indices].max().item())
    lost = (base.exp() * (base - other))[out].sum() / base.exp()[out].sum()
    # The upper bound holds where unseen tokens lost no more than the worst that was seen.
    assert found.most >= exact - 1e-6 or lost > worst
    whole = partial_kl(base[every.indices], every.values, whole=True)
    assert whole.least == whole.most == pytest.approx(exact, abs=1e-6)


class FakeVllm(BaseHTTPRequestHandler):
    """vLLM's completions endpoint, as far as `evaluate_url` uses it."""

    model: Any
    cards: list[dict[str, Any]]
    most: int

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"data": self.cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = body["prompt_logprobs"]
        if self.most != -1 and not 0 <= count <= self.most:
            error = f"Requested prompt logprobs of {count}, which is greater than {self.most}"
            self._answer(400, {"error": {"message": error}})
            return
        tokens = torch.tensor(body["prompt"])
        log_q = next_token_logits(self.model, tokens).float().log_softmax(-1)
        positions: list[dict[int, Any] | None] = [None]
        for row, target in zip(log_q, tokens[1:].tolist(), strict=True):
            ids = row.topk(len(row) if count == -1 else count).indices.tolist()
            positions.append({i: {"logprob": row[i].item()} for i in {*ids, target}})
        self._answer(200, {"choices": [{"prompt_logprobs": positions}]})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(novels_8m: Path) -> Iterator[tuple[str, type[FakeVllm]]]:
    """A server of novels-8m with every weight matrix disturbed, and its handler class."""
    model = load_model(novels_8m)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    cards = [{"id": "novels", "root": str(novels_8m), "max_model_len": 512}]
    handler = type("Handler", (FakeVllm,), {"model": model, "cards": cards, "most": -1})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/", handler
        server.shutdown()
        thread.join()


def test_a_served_model_gives_the_numbers_of_an_offline_one(
    served: tuple[str, type[FakeVllm]], novels_8m: Path, text: Path
) -> None:
    url, handler = served
    base, expected = load_model(novels_8m), Sums()
    for window in windows(text, load_tokenizer(novels_8m), 24, 40):
        logits = [next_token_logits(m, window) for m in (base, handler.model)]
        expected += compare_logits(*logits, window[1:])
    exact = expected.result().to_dict()
    whole, some = (
        evaluate_url(url, novels_8m, text, length=24, limit_tokens=40, logprobs=k).to_dict()
        for k in (-1, 20)
    )
    kinds = [numbers.pop("kl_kind") for numbers in (exact, whole, some)]
    assert kinds == ["exact", "exact", "lower_bound"]
    ends = [numbers.pop("intervals") for numbers in (exact, whole, some)]
    assert [numbers.pop("sequences") for numbers in (exact, whole, some)] == [1, 2, 2]
    assert ends[0] is None
    assert ends[1].keys() - ends[2].keys() == {"margin_ratio"}
    assert whole == pytest.approx(exact, rel=1e-4)
    # Of some tokens only a lower bound of what they share is known, and of margins nothing.
    assert some.pop("margin_ratio") is None
    assert exact.pop("margin_ratio") is not None
    acceptance = exact.pop("acceptance")
    assert acceptance / 2 < some.pop("acceptance") < acceptance
    kl, most = exact.pop("kl"), exact.pop("kl_most")
    assert most == kl
    assert 0.1 * kl < some.pop("kl") <= kl <= some.pop("kl_most") < 6 * kl
    assert some == pytest.approx(exact, rel=1e-4)


def test_what_a_server_cannot_do_is_one_line(
    served: tuple[str, type[FakeVllm]], novels_8m: Path, text: Path
) -> None:
    url, handler = served

    def says(**options: Any) -> str:
        with pytest.raises(ServerError) as caught:
            evaluate_url(url, novels_8m, text, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "takes 512 tokens; give a length of 511 at most" in says(length=512)
    assert "other is not served; it serves novels" in says(model="other", length=24)
    handler.most = 20
    assert "larger --max-logprobs" in says(model=str(novels_8m), length=24, logprobs=-1)
    handler.cards = []
    assert "it serves no model" in says(length=24)
    url = "http://127.0.0.1:9"
    assert "http://127.0.0.1:9/v1/models: no answer" in says(length=24)
    url = "localhost:9"
    assert "localhost:9/v1/models: no answer" in says(length=24)

"""Text a model writes itself: from its own distribution, with little of it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.calibration import self_generated as sampling
from compress_methods.calibration.self_generated import (
    batch_rows,
    sample_from_model,
    stream_weights,
)
from compress_methods.calibration.tokens import CalibrationSettings
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.model.skeleton import build_skeleton
from compress_methods.system.progress import Progress
from tests.e2e.support.tiny import MODELS, make_model
from tests.e2e.support.zoo import MIXTURES

SMALL = CalibrationSettings(samples=4, length=16, seed=0, held_out=2)


def opened(directory: Path) -> Source:
    return open_source(directory, build_skeleton(directory), directory.name, False)


@pytest.fixture(scope="module")
def source(novels_8m: Path) -> Source:
    return opened(novels_8m)


def test_the_model_writes_text_that_it_finds_likely(
    source: Source, novels_8m: Path, tokenizer: Any
) -> None:
    settings = CalibrationSettings(samples=10, length=48, seed=3, held_out=2)
    progress = Progress(1, "sampling", quiet=True)
    tokens = sample_from_model(source, tokenizer, settings, progress)
    assert tokens.shape == (12, 48)
    assert tokens.dtype == torch.int64
    assert progress.done == progress.total == 12 * 48
    assert (tokens != 0).all()
    assert len(tokens[:, 0].unique()) == 12
    assert len(tokens.unique()) > 100
    assert torch.equal(tokens, sample_from_model(source, tokenizer, settings))

    logits = load_model(novels_8m)(input_ids=tokens).logits[:, :-1]
    greedy = slice(0, sampling.GREEDY_TOKENS)
    logits[..., 0] = -torch.inf
    assert torch.equal(logits[:, greedy].argmax(-1), tokens[:, 1:][:, greedy])
    rank = (logits > logits.gather(-1, tokens[:, 1:, None])).sum(-1)[:, sampling.GREEDY_TOKENS :]
    assert 0.1 < (rank == 0).float().mean() < 0.7
    assert rank.float().median() < 50


def test_a_row_does_not_depend_on_its_batch(
    source: Source, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrationSettings(samples=5, length=12, held_out=2)
    together = sample_from_model(source, tokenizer, settings)
    monkeypatch.setattr(sampling, "MAX_BATCH", 3)
    assert torch.equal(sample_from_model(source, tokenizer, settings), together)


def test_sampled_rows_start_with_bos_where_prompts_do(source: Source, with_bos: Any) -> None:
    tokens = sample_from_model(source, with_bos, CalibrationSettings(3, 10, 0, 1))
    assert tokens.shape == (4, 10)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:] != 0).all()


def test_sampling_follows_the_distribution() -> None:
    """A chi-squared test of what `_generate` draws from a model that always says the same."""
    logits = torch.tensor([-torch.inf, 0.0, 1.0, 2.0, 9.0])

    class Constant:
        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            out = logits.expand(len(input_ids), 1, -1)
            return type("Out", (), {"logits": out, "past_key_values": None})

    banned = torch.tensor([False, False, False, False, True])
    draws = torch.rand(500, 15, generator=torch.Generator().manual_seed(0))
    start = torch.ones(500, 1, dtype=torch.int64)
    tokens = sampling._generate(Constant(), start, draws, banned, None)
    assert (tokens[:, 1:5] == 3).all()
    counts = tokens[:, 5:].flatten().bincount(minlength=5)
    expected = logits[1:4].softmax(-1) * 5000
    assert counts[0] == counts[4] == 0
    assert ((counts[1:4] - expected) ** 2 / expected).sum() < 13.8  # p = 0.001, 2 degrees


def test_a_model_too_large_or_too_short_is_refused_before_loading(
    source: Source, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match="length is 4096, but novels-8m takes 2048 tokens"):
        sample_from_model(source, tokenizer, CalibrationSettings(length=4096))
    monkeypatch.setattr(sampling, "available_bytes", lambda: 10**7)
    with pytest.raises(CalibrationError) as caught:
        sample_from_model(source, tokenizer, SMALL)
    assert str(caught.value) == (
        "novels-8m: 16.0 MiB of weights do not fit 9.5 MiB of free memory and would be read from "
        "disk for every token the model writes; give --calibration FILE"
    )


@pytest.mark.parametrize("kind", [*MODELS, "Mixtral"])
@pytest.mark.parametrize("resident", [0, 2**28])
def test_a_streamed_model_computes_what_the_loaded_one_does(
    kind: str, resident: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token with a cache, blocks in shared buffers or resident, tied or not, experts
    stored one by one."""
    monkeypatch.setattr(sampling, "RESIDENT_BYTES", resident)
    directory = make_model(kind, tmp_path, **(MIXTURES["mixtral"][1] if kind == "Mixtral" else {}))
    skeleton = build_skeleton(directory)
    stream_weights(skeleton, opened(directory))
    tokens = torch.randint(2, 512, (3, 9), generator=torch.Generator().manual_seed(0))
    cache, parts = None, []
    with torch.inference_mode():
        for position in range(tokens.shape[1]):
            new = tokens[:, position, None]
            out = skeleton.model(input_ids=new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        expected = load_model(directory)(input_ids=tokens).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-4)


def test_streamed_blocks_share_their_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sampling, "RESIDENT_BYTES", 0)
    directory = make_model("Llama", tmp_path, num_hidden_layers=6)
    skeleton = build_skeleton(directory)
    stream_weights(skeleton, opened(directory))
    skeleton.model(input_ids=torch.tensor([[5, 6]]))
    places = {block.mlp.up_proj.weight.data_ptr() for block in skeleton.blocks}
    assert len(places) == 1
    assert len(skeleton.module(skeleton.embedding).weight) == 2


class Killed(Exception):
    pass


def test_finished_batches_are_kept(
    source: Source, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrationSettings(samples=7, length=12, held_out=2)
    monkeypatch.setattr(sampling, "MAX_BATCH", 3)
    undisturbed = sample_from_model(source, tokenizer, settings)
    kept = tmp_path / "tokens.safetensors"
    generate, calls = sampling._generate, []

    def generate_twice(*args: Any) -> torch.Tensor:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise Killed
        return generate(*args)

    monkeypatch.setattr(sampling, "_generate", generate_twice)
    with pytest.raises(Killed):
        sample_from_model(source, tokenizer, settings, None, kept)
    progress = Progress(1, "sampling", quiet=True)
    assert torch.equal(sample_from_model(source, tokenizer, settings, progress, kept), undisturbed)
    assert torch.equal(sample_from_model(source, tokenizer, settings, None, kept), undisturbed)
    assert calls == [3, 3, 3, 3]
    assert progress.done == progress.total == 9 * 12


def test_batches_are_equal_and_their_cache_is_bounded(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_skeleton(source.directory).model.config
    settings = CalibrationSettings(samples=64, length=512, held_out=8)
    assert batch_rows(config, settings) == 72
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    sequence = 2 * config.num_hidden_layers * heads * 4 * 512
    monkeypatch.setattr(sampling, "CACHE_BYTES", 37 * sequence)
    assert batch_rows(config, settings) == 36
    monkeypatch.setattr(sampling, "CACHE_BYTES", 1)
    assert batch_rows(config, settings) == 1


def test_a_value_that_is_not_finite_stops_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "RESIDENT_BYTES", 0)
    directory = make_model("Llama", tmp_path)
    file = directory / "model.safetensors"
    tensors = read_tensors(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    write_tensors(file, tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has 1 values that are not"):
        sample_from_model(opened(directory), tokenizer, SMALL)

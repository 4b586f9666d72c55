"""On CPUs, `serve` chooses memory for the KV cache that is there, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods.errors import CompressError
from tests.conftest import REPOSITORY
from vllm_compress.commands import serve
from vllm_compress.operations import kv_cache
from vllm_compress.operations.kv_cache import GIB, MIB, kept_by, kv_cache_options

MODEL = str(REPOSITORY / "tests" / "assets" / "novels-8m")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """10 GiB free, on a machine of one memory node."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(kv_cache, "NODES", tmp_path)


@pytest.mark.parametrize(
    ("weights", "workers", "each"),
    [(0, 1, 4 * GIB), (4 * GIB, 1, 2 * GIB), (4 * GIB, 2, GIB), (7 * GIB, 1, 512 * MIB)],
)
def test_half_of_what_is_left_is_taken(weights: int, workers: int, each: int) -> None:
    added, line = kv_cache_options(set(), weights, workers)
    assert added == ["--kv-cache-memory-bytes", str(each)]
    assert "of 10.0 GiB free; VLLM_CPU_KVCACHE_SPACE (GiB) or --kv-cache-memory-bytes" in line
    assert "\n" not in line


def test_a_draft_keeps_its_part_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the model's own config says, twice; and a request must fit."""
    config = json.loads((Path(MODEL) / "config.json").read_text())
    values = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    token = 2 * 2 * values * config["num_hidden_layers"]
    alone, both = (kept_by([MODEL] * n, 1, 2, None) for n in (1, 2))
    assert alone is not None
    assert both is not None
    assert (alone.block_bytes, both.block_bytes) == (128 * token, 2 * 128 * token)
    assert alone.context == config["max_position_embeddings"]
    assert "GiB for " in kv_cache_options(set(), 0, 1, alone)[1]
    assert "tokens of model and draft, half" in kv_cache_options(set(), 0, 1, both)[1]
    tokens = both.tokens(4 * GIB)
    long = kept_by([MODEL] * 2, 1, 2, tokens)
    assert kv_cache_options(set(), 0, 1, long)[0]
    longer = kept_by([MODEL] * 2, 1, 2, tokens + 1)
    match = r"a request of [\d,]+ tokens keeps 4\.0 GiB of the model and its draft, .* has 4\.0 GiB"
    with pytest.raises(CompressError, match=match):
        kv_cache_options(set(), 0, 1, longer)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    with pytest.raises(CompressError, match=r"the KV cache has 3\.0 GiB; lower --max-model-len"):
        kv_cache_options(set(), 0, 1, longer)


def test_what_is_said_of_the_cache_is_read() -> None:
    assert serve._kept([]) == (2, None)
    assert serve._kept(["--dtype", "float32", "--max-model-len=512"]) == (4, 512)
    assert serve._kept(["--kv-cache-dtype", "fp8_e5m2", "--max-model-len", "auto"]) == (1, 1)


@pytest.mark.parametrize("option", ["kv-cache-memory-bytes", "gpu-memory-utilization", "config"])
def test_a_users_own_choice_stays(option: str) -> None:
    assert kv_cache_options({option, "port"}, GIB, 1) == ([], "")


def test_the_variable_stays_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert kv_cache_options(set(), 4 * GIB, 1) == ([], "")
    with pytest.raises(CompressError) as caught:
        kv_cache_options(set(), 4 * GIB, 2)
    assert str(caught.value) == (
        "10.0 GiB of memory are free, too little for weights of 4.0 GiB and 2.0 GiB for vLLM "
        "itself and 2 x 4.0 GiB of KV cache (VLLM_CPU_KVCACHE_SPACE=4)"
    )
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "half")
    with pytest.raises(CompressError, match="'half', expected a whole number of GiB"):
        kv_cache_options(set(), 0, 1)


@pytest.mark.parametrize("options", [set(), {"gpu-memory-utilization"}])
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(options: set[str]) -> None:
    with pytest.raises(CompressError, match=r"free, too little for weights of 8\.0 GiB"):
        kv_cache_options(options, 8 * GIB, 1)


def test_a_worker_stays_on_its_memory_node(tmp_path: Path) -> None:
    """As vLLM counts what is free there."""
    for node, free in (("node0", 3), ("node1", 2), ("node2", 0)):
        (tmp_path / node).mkdir()
        text = f"Node 0 MemTotal: 99 kB\nNode 0 MemFree: {free * MIB} kB\nNode 0 FilePages: 7 kB\n"
        if free:
            text += f"Node 0 Inactive(file): {MIB} kB\n"
        (tmp_path / node / "meminfo").write_text(text)
    assert kv_cache.free_bytes(1) == 4 * GIB
    assert kv_cache.free_bytes(2) == 6 * GIB
    assert kv_cache_options(set(), 0, 2)[0] == ["--kv-cache-memory-bytes", str(GIB)]


@pytest.fixture
def vllm_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What follows `vllm serve MODEL` when vLLM's own command is reached."""
    import vllm.entrypoints.cli.main as main

    words: list[str] = []
    monkeypatch.setattr(serve, "_on_cpu", lambda: True)
    monkeypatch.setattr("vllm_compress.operations.engine_watch.watch_engine", lambda: None)
    monkeypatch.setattr(main, "main", lambda: words.extend(serve.sys.argv[3:]))
    return words


@pytest.mark.slow
def test_serve_hands_it_to_vllm(
    vllm_words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve.sys, "argv", ["vllm-compress"])
    serve.run_vllm(["serve", MODEL, "-tp", "2", "--data-parallel-size", "2"])
    weights = 2 * Path(MODEL, "model.safetensors").stat().st_size
    each = int(vllm_words[-1])
    assert vllm_words[:-1] == ["-tp", "2", "--data-parallel-size", "2", "--kv-cache-memory-bytes"]
    assert each % MIB == 0
    assert abs(4 * each - (8 * GIB - weights) / 2) < 8 * MIB
    assert capsys.readouterr().err.startswith(
        "KV cache: 4 x 1.0 GiB for 521,728 tokens, half of what"
    )
    del vllm_words[:]
    serve.run_vllm(["serve", MODEL, "--gpu_memory_utilization=0.3"])
    assert vllm_words == ["--gpu_memory_utilization=0.3"]
    del vllm_words[:]
    serve.run_vllm(["serve", MODEL, "--help=all"])
    assert vllm_words == ["--help=all"]
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: 2 * GIB)
    with pytest.raises(CompressError, match=r"2\.0 GiB of memory are free, too little"):
        serve.run_vllm(["serve", MODEL])

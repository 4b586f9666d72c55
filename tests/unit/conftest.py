"""Fixtures of the tests that start no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods.calibration.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(novels_8m: Path) -> Any:
    return load_tokenizer(novels_8m)


@pytest.fixture(scope="module")
def with_bos(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same tokenizer, putting BOS before every text as Llama's does."""
    folder = tmp_path_factory.mktemp("bos")
    for path in novels_8m.glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    block = json.loads((folder / "tokenizer.json").read_text())
    bos = "<|endoftext|>"
    block["post_processor"]["special_tokens"] = {bos: {"id": bos, "ids": [0], "tokens": [bos]}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    block["post_processor"]["single"].insert(0, special)
    (folder / "tokenizer.json").write_text(json.dumps(block))
    return load_tokenizer(folder)


@pytest.fixture
def one_matrix(tmp_path: Path) -> Path:
    """A directory with one 4-bit matrix and one norm, as `convert` lays them out."""
    import torch

    from compress_methods.checkpoint.safetensors import write_tensors
    from compress_methods.formats import format_from_dict

    folder = tmp_path / "one-matrix"
    folder.mkdir()
    spec = {"format": "integer", "bits": 4, "group_size": 32, "symmetric": True}
    fmt = format_from_dict(spec)
    weight = torch.randn(64, 128)
    tensors = {f"up.{k}": v for k, v in fmt.pack(fmt.nearest(weight)).items()}
    tensors["norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    write_tensors(folder / "model.safetensors", tensors)
    block = {
        "quant_method": "vllm_compress",
        "version": 1,
        "formats": {"w4": spec},
        "modules": [{"match": "up", "format": "w4", "shape": [64, 128]}],
        "base_model": "someone/base",
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return folder

"""A checkpoint's summary is that of its files, and open where they do not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.safetensors import write_tensors
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from tests.conftest import REPOSITORY
from vllm_compress.metrics.checkpoint_summary import summarize_checkpoint

MODEL = REPOSITORY / "tests" / "assets" / "novels-8m"


def test_summary_of_a_compressed_model_counts_every_tensor(one_matrix: Path) -> None:
    found = summarize_checkpoint(str(one_matrix), "vllm_compress")
    stored = sum(entry.nbytes for entry in read_entries(one_matrix).values())
    assert found.weight_bytes == stored
    assert found.bits_per_weight == pytest.approx(stored * 8 / (64 * 128 + 64))
    assert (found.base_model, found.formats) == ("someone/base", "int4 g32")
    assert found.sparsity == 0


def test_sparsity_counts_what_is_not_stored(one_matrix: Path) -> None:
    """Three quarters of the one matrix of 64 x 128; the norm of 64 is dense."""
    fmt = Sparse(32, 128, Integer(8, -1))
    tensors = {f"up.{k}": v for k, v in fmt.pack(fmt.nearest(torch.randn(64, 128))).items()}
    write_tensors(one_matrix / "model.safetensors", {**tensors, "norm.weight": torch.ones(64)})
    config = json.loads((one_matrix / "config.json").read_text())
    config["quantization_config"]["formats"]["w4"] = fmt.to_dict()
    (one_matrix / "config.json").write_text(json.dumps(config))
    found = summarize_checkpoint(str(one_matrix), "vllm_compress")
    assert found.sparsity == pytest.approx(0.75 * 64 * 128 / (64 * 128 + 64))
    assert found.formats == "32:128 int8 row"


@pytest.mark.parametrize("method", [None, "gptq", "vllm_compress"])
def test_what_cannot_be_read_is_left_open(tmp_path: Path, method: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    for model in (str(tmp_path), "no-such/model"):
        found = summarize_checkpoint(model, method)
        assert (found.weight_bytes, found.bits_per_weight) == (None, None)
        assert found.formats == (method or "none")


def test_other_methods_keep_their_name_and_no_bits_per_weight() -> None:
    found = summarize_checkpoint(str(MODEL), "fp8")
    assert (found.formats, found.bits_per_weight) == ("fp8", None)
    assert found.weight_bytes

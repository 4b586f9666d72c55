"""A result split into its base and a LoRA adapter: together they are the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress_methods import convert, split_adapter
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.conversion.exchange import adapter
from compress_methods.errors import CheckpointError, OutputError
from vllm_compress.cli import main

INT2 = {"format": "integer", "bits": 2, "group_size": 64}
INT8 = {"format": "integer", "bits": 8, "group_size": -1}
RECIPE = {
    "formats": {
        "few": {"format": "lowrank", "rank": 4, "base": INT2},
        "more": {"format": "lowrank", "rank": 32, "base": INT2, "factors": INT8},
        "w8": INT8,
    },
    "modules": [
        {"match": r"re:.*\.[01]\..*down_proj", "format": "more"},
        {"match": r"re:.*\.[01]\..*(o_proj|gate_proj|up_proj)", "format": "few"},
        {"match": "blocks", "format": "w8"},
    ],
    "calibration": {"held_out": 0},
}


@pytest.fixture(scope="module")
def whole(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lowrank") / "out"
    convert(novels_8m, RECIPE, out, quiet=True)
    return out


def test_base_and_adapter_are_the_result(whole: Path, tmp_path: Path) -> None:
    ranks = split_adapter(whole, tmp_path / "apart")
    result, base = open_compressed(whole), open_compressed(tmp_path / "apart" / "base")
    tensors = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "apart" / "adapter" / "adapter_config.json").read_text())
    assert set(ranks.values()) == {4, 32}
    assert len(tensors) == 2 * len(ranks) == 2 * 2 * 4
    assert base.dense.keys() == result.dense.keys()
    for module, matrix in result.matrices.items():
        values = base.matrices[module].unpack()
        assert base.matrices[module].format.describe() in ("int2 g64", "int8 row")
        if module in ranks:
            name, rank = f"base_model.model.{module}", ranks[module]
            left, right = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            assert (left.shape, right.shape) == ((matrix.rows, rank), (rank, matrix.cols))
            assert left.dtype == right.dtype == torch.bfloat16
            assert settings["rank_pattern"].get(module, settings["r"]) == rank
            assert settings["alpha_pattern"].get(module, settings["lora_alpha"]) == rank
            assert float((left.float() @ right.float()).norm()) > 0
            values = values + left.float() @ right.float()
        torch.testing.assert_close(values, matrix.unpack(), rtol=1e-2, atol=1e-3)
    assert settings["target_modules"] == ["down_proj", "gate_proj", "o_proj", "up_proj"]
    assert (settings["peft_type"], settings["bias"]) == ("LORA", "none")
    assert (tmp_path / "apart" / "base" / "tokenizer.json").is_file()


def test_nothing_half_written_stays(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "_write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        split_adapter(whole, tmp_path / "apart")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split-adapter", str(whole), "-o", str(tmp_path / "apart")]) == 0
    assert "factors of 8 matrices, rank 32 at most" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == ["adapter", "base"]
    assert main(["split-adapter", str(whole), "-o", str(tmp_path / "apart")]) == 2
    assert "apart: exists already" in capsys.readouterr().err


def test_what_cannot_be_split_is_refused_in_one_line(
    whole: Path, novels_8m: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="exists already"):
        split_adapter(whole, tmp_path)
    recipe = {
        "formats": {"w": {"format": "lowrank", "rank": 4}, "w8": INT8},
        "modules": [{"match": "re:.*0.mlp.down_proj", "format": "w"}],
        "calibration": {"held_out": 0},
    }
    convert(novels_8m, recipe, tmp_path / "alone", quiet=True)
    with pytest.raises(CheckpointError, match="down_proj: is rank 4 alone, without a base"):
        split_adapter(tmp_path / "alone", tmp_path / "apart")
    recipe["modules"] = [{"match": "re:.*0.mlp.down_proj", "format": "w8"}]
    convert(novels_8m, recipe, tmp_path / "int8", quiet=True)
    with pytest.raises(CheckpointError, match="no matrix is in format 'lowrank'"):
        split_adapter(tmp_path / "int8", tmp_path / "apart")
    assert not (tmp_path / "apart").exists()

"""Ten kinds of method, each one file as another distribution would write it (`tests/third_party`),
go through conversion without a line changed elsewhere."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import FORMATS
from compress_methods.kernels import KERNELS
from compress_methods.model import architecture
from tests.conftest import REPOSITORY

TOYS = REPOSITORY / "tests" / "third_party"
CALIBRATION = {"samples": 8, "length": 64, "held_out": 2}
INT2 = {"format": "integer", "bits": 2, "group_size": 32}
INT4 = {"format": "integer", "bits": 4, "group_size": 64}
INT8 = {"format": "integer", "bits": 8, "group_size": -1}


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module that the test names, its entries taken out of every table again."""
    tables = (FORMATS._classes, KERNELS._classes, architecture._ROWS)
    kept = [dict(table) for table in tables]
    yield importlib.import_module(f"tests.third_party.{request.param}")
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


def recipe(formats: dict[str, Any], modules: list[dict[str, Any]], *stages: Any) -> dict[str, Any]:
    packing = {"formats": formats, "modules": modules}
    if not stages:
        return {**packing, "calibration": CALIBRATION}
    return {"stages": [*stages, packing], "calibration": CALIBRATION}


def converted(model: Path, out: Path, what: dict[str, Any], text: Path, **more: Any) -> Any:
    return convert(model, what, out, calibration=text, device="cpu", quiet=True, **more)


def test_a_toy_is_at_most_sixty_lines_of_code() -> None:
    for path in TOYS.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 60, path.name


@pytest.mark.parametrize("toy", ["lookup"], indirect=True)
def test_lookup_format_filled_by_gptq(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    losses = {}
    for algorithm in ("gptq", "rtn"):
        rules = [{"match": "blocks", "format": "t", "algorithm": algorithm}]
        what = recipe({"t": {"format": "lookup2"}}, rules)
        losses[algorithm] = converted(novels_8m, tmp_path / algorithm, what, some_text)["held_out"]
    assert losses["gptq"]["kl"] < 0.8 * losses["rtn"]["kl"]
    matrix = next(iter(open_compressed(tmp_path / "gptq").matrices.values()))
    assert all(len(row.unique()) <= 4 for row in matrix.unpack()[:20])


@pytest.mark.parametrize("toy", ["low_rank"], indirect=True)
def test_wrapper_format_corrects_its_base(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    formats = {"base": INT2, "both": {"format": "low_rank", "base": INT2, "rank": 32}}
    half = r"re:model\.layers\.[0-3]\..*"
    alone = [{"match": half, "format": "base", "algorithm": "gptq"}]
    both = [{"match": half, "format": "both", "algorithm": "corrected_gptq"}]
    plain = converted(novels_8m, tmp_path / "a", recipe(formats, alone), some_text)
    fixed = converted(novels_8m, tmp_path / "b", recipe(formats, both), some_text)
    assert fixed["held_out"]["kl"] < 0.8 * plain["held_out"]["kl"]


@pytest.mark.parametrize("toy", ["sharing"], indirect=True)
def test_shared_layer_is_stored_once_and_loaded_twice(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    rules = [{"match": "blocks", "format": "w", "algorithm": "rtn"}]
    stage = {"transform": "share", "layer": 3, "owner": 2}
    report = converted(novels_8m, tmp_path / "out", recipe({"w": INT8}, rules, stage), some_text)
    assert report["held_out"]["kl"] > 0.001
    stored = open_compressed(tmp_path / "out")
    assert not [name for name in stored.matrices if ".layers.3." in name]
    assert "model.layers.3.input_layernorm.weight" in stored.dense
    blocks = load_model(tmp_path / "out").model.layers
    for own, other in zip(blocks[3].parameters(), blocks[2].parameters(), strict=True):
        assert torch.equal(own, other) == (own.dim() == 2)


@pytest.mark.parametrize("toy", ["smoothing"], indirect=True)
def test_smoothing_keeps_the_function_and_knows_the_packing(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    rules = [{"match": "blocks", "format": "w", "algorithm": "rtn"}]
    plain = recipe({"w": INT2}, rules)
    smooth = recipe({"w": INT2}, rules, {"transform": "smooth"})
    before = converted(novels_8m, tmp_path / "a", plain, some_text)["held_out"]["kl"]
    after = converted(novels_8m, tmp_path / "b", smooth, some_text)["held_out"]["kl"]
    assert after < before
    alone = {"stages": [{"transform": "smooth"}], "calibration": CALIBRATION}
    assert converted(novels_8m, tmp_path / "c", alone, some_text)["held_out"]["kl"] < 1e-4


@pytest.mark.parametrize("toy", ["training"], indirect=True)
def test_pass_that_trains_a_block(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    rules = [{"match": "blocks", "format": "w", "algorithm": "rtn"}]
    plain = recipe({"w": INT2}, rules)
    trained = recipe({"w": INT2}, rules, {"transform": "train_block"})
    before = converted(novels_8m, tmp_path / "a", plain, some_text)["held_out"]["kl"]
    after = converted(novels_8m, tmp_path / "b", trained, some_text)["held_out"]["kl"]
    assert after < 0.8 * before


@pytest.mark.parametrize("toy", ["experts"], indirect=True)
@pytest.mark.parametrize("fused", [False, True])
def test_fused_experts_are_packed_one_by_one(toy: Any, tmp_path: Path, fused: bool) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    if fused:  # as they lie in memory, all experts in one tensor
        for path in (tmp_path / "model").glob("*.safetensors*"):
            path.unlink()
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    rules = [{"match": "experts", "format": "w", "algorithm": "rtn"}]
    what = {"formats": {"w": {**INT8, "group_size": 32}}, "modules": rules}
    convert(tmp_path / "model", what, tmp_path / "out", device="cpu", quiet=True)
    stored = open_compressed(tmp_path / "out").matrices
    assert len(stored) == 2 * 4 * 3
    whole = model.model.layers[1].mlp.experts.gate_up_proj[2].detach()
    up = stored["model.layers.1.mlp.experts.2.up_proj"].unpack()
    assert torch.allclose(up, whole[32:], atol=float(whole.abs().max()) / 100)
    loaded = load_model(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("toy", ["layout"], indirect=True)
def test_foreign_layout_is_written_and_read_exactly(
    toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    rules = [{"match": "blocks", "format": "w", "algorithm": "rtn"}]
    what = recipe({"w": INT8}, rules)
    report = converted(novels_8m, tmp_path / "own", what, some_text)
    foreign = converted(novels_8m, tmp_path / "foreign", what, some_text, layout="transposed_int8")
    assert foreign["held_out"] == report["held_out"]
    block = json.loads((tmp_path / "foreign" / "config.json").read_text())["quantization_config"]
    assert block == {"quant_method": "transposed_int8"}
    own, read = load_model(tmp_path / "own"), load_model(tmp_path / "foreign")
    for mine, theirs in zip(own.parameters(), read.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    again = converted(tmp_path / "foreign", tmp_path / "again", what, some_text)
    assert again["held_out"]["kl"] < report["held_out"]["kl"]
    with pytest.raises(FormatError, match="int4 g64 has no equal in transposed_int8"):
        converted(
            novels_8m, tmp_path / "no", recipe({"w": INT4}, rules), some_text,
            layout="transposed_int8",
        )  # fmt: skip


def test_source_of_a_tool_nobody_knows_is_refused(novels_8m: Path, tmp_path: Path) -> None:
    for path in novels_8m.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quanto"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized by 'quanto'"):
        convert(tmp_path, "int4-rtn", tmp_path / "out", quiet=True)


@pytest.mark.parametrize("toy", ["encoder"], indirect=True)
def test_encoder_needs_a_row(toy: Any, novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((novels_8m / name).read_bytes())
    formats = {"w": {**INT4, "bits": 3, "group_size": 32}}
    losses = {}
    for algorithm in ("gptq", "rtn"):
        rules = [{"match": "blocks", "format": "w", "algorithm": algorithm}]
        out = tmp_path / algorithm
        report = converted(tmp_path / "model", out, recipe(formats, rules), some_text)
        losses[algorithm] = report["held_out"]["kl"]
        assert report["held_out"]["tokens"] == CALIBRATION["held_out"] * CALIBRATION["length"]
        assert len(report["modules"]) == 3 * 6
    assert 0 < losses["gptq"] < losses["rtn"]
    loaded = load_model(tmp_path / "gptq")
    assert type(loaded).__name__ == "BertForMaskedLM"

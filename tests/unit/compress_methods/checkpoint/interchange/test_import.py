"""`import` stores the numbers of other tools' checkpoints in formats of ours, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import import_checkpoint, load_model
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.interchange.parts.recast import common, recast
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.checkpoint.source import resolve_model
from compress_methods.errors import CompressError
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.wrappers.reordered import Reordered
from compress_methods.formats.wrappers.shifted import Shifted
from tests.e2e.support.foreign import write_foreign
from tests.e2e.support.tiny import make_model
from tests.unit.compress_methods.checkpoint.interchange.test_foreign import (
    ASSETS,
    EVERY,
    EXACT,
    expected,
    logprobs,
)

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", EVERY)
def test_log_probabilities_are_those_of_the_tool(name: str, tmp_path: Path) -> None:
    report = import_checkpoint(ASSETS / name, tmp_path / "o", quiet=True)
    kinds = {module["format"] for module in report["modules"].values()}
    assert kinds == {EXACT[name]}
    algorithms = {module["algorithm"] for module in report["modules"].values()}
    assert algorithms == {"repack"}
    own, theirs = load_model(tmp_path / "o"), load_model(resolve_model(ASSETS / name))
    for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    prompt, wanted = expected(name)
    inputs = "int8" not in name  # whose own inputs are as they are in both
    assert (logprobs(own, prompt) - wanted).abs().max() < (1e-3 if inputs else 0.1)


def test_what_no_format_holds_is_refused_by_name_rounded_or_unpacked(tmp_path: Path) -> None:
    other = other_table(tmp_path / "other")
    with pytest.raises(CompressError, match="no format holds its numbers exactly") as caught:
        import_checkpoint(other, tmp_path / "o", quiet=True)
    assert "7 matrices (model.layers.*.self_attn.q_proj" in str(caught.value)
    assert not (tmp_path / "o").exists()
    report = import_checkpoint(other, tmp_path / "rounded", inexact="int8", quiet=True)
    kinds = {(m["format"], m["algorithm"]) for m in report["modules"].values()}
    assert kinds == {("int8 g32", "rtn")}
    mixed = mixture(tmp_path / "mixed")
    with pytest.raises(CompressError, match=r"2 matrices \(model.layers.\*.mlp.gate_proj"):
        import_checkpoint(mixed, tmp_path / "o", quiet=True)
    import_checkpoint(mixed, tmp_path / "o", inexact="bfloat16", quiet=True)
    result = open_compressed(tmp_path / "o")
    assert len(result.matrices) == 5
    kept = result.dense[f"{UP}.weight"]
    assert kept.dtype == "bfloat16"
    assert torch.equal(kept.read(), load_model(mixed).get_parameter(f"{UP}.weight").bfloat16())


def other_table(out: Path) -> Path:
    """A checkpoint of bitsandbytes whose codes stand for values of another table than its own."""
    out.mkdir()
    name = ASSETS / "bitsandbytes-nf4"
    tensors = read_tensors(name / "model.safetensors")
    for key in tensors:
        if key.endswith(".quant_map"):
            tensors[key] = tensors[key] * 0.75
    write_tensors(out / "model.safetensors", tensors)
    (out / "config.json").write_bytes((name / "config.json").read_bytes())
    return out


def mixture(out: Path) -> Path:
    """An AWQ checkpoint of which one scale is larger than float32 scales can tell from infinity."""
    out.mkdir()
    tensors = read_tensors(ASSETS / "gptq-v2-3bit" / "model.safetensors")
    places = tensors[f"{UP}.g_idx"]
    places[places == 0] = 1  # groups of two sizes
    write_tensors(out / "model.safetensors", tensors)
    (out / "config.json").write_bytes((ASSETS / "gptq-v2-3bit" / "config.json").read_bytes())
    return out


def test_groups_that_ranks_would_cut_become_smaller_ones(tmp_path: Path) -> None:
    model = make_model("Llama", tmp_path / "m", intermediate_size=384)
    fmt = Integer(4, 128, scale_dtype="float16")
    packed, _ = write_foreign(model, tmp_path, "gptq", fmt)
    import_checkpoint(packed, tmp_path / "one", quiet=True)
    import_checkpoint(packed, tmp_path / "two", tensor_parallel_size=2, quiet=True)
    formats = {
        out: open_compressed(tmp_path / out).matrices["model.layers.1.mlp.down_proj"].format
        for out in ("one", "two")
    }
    assert formats["one"] == fmt
    assert formats["two"] == Integer(4, 64, scale_dtype="float16")  # of 192 columns each
    one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_plain_model_is_nothing_to_import(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="is not quantized; convert it with a recipe"):
        import_checkpoint(make_model("Llama", tmp_path / "m"), tmp_path / "o", quiet=True)


@pytest.mark.parametrize(
    ("formats", "wanted"),
    [
        ([Integer(4, 128), Integer(4, 128)], Integer(4, 128)),
        ([Integer(4, 128), Integer(8, 32)], Integer(8, 32)),
        ([Integer(4, -1), Integer(4, 64, symmetric=False)], Integer(4, 64, symmetric=False)),
        ([Integer(3, 64), Reordered(Integer(4, 64))], Reordered(Integer(4, 64))),
        ([Integer(8, -1), Float("fp8")], None),
        (
            [Shifted(Integer(4, 64)), Shifted(Integer(5, 32), "float32"), Integer(3, -1)],
            Shifted(Integer(5, 32), "float32"),
        ),
        ([Shifted(Integer(4, 32)), Integer(4, 32, scale_dtype="float32")], None),
        ([Shifted(Integer(4, 32)), Lookup(4, 32, "nf4")], None),
        ([Integer(8, -1), Integer(8, -1, activations="int8")], None),
    ],
)
def test_neighbours_get_a_format_that_holds_all_of_them(formats: Any, wanted: Any) -> None:
    assert common(formats) == wanted
    for fmt in formats if wanted is not None else ():
        solution = fmt.nearest(torch.randn(16, 256))
        found = recast(fmt, solution, wanted)
        assert torch.equal(wanted.unpack(wanted.pack(found)), fmt.matrix(solution))


def test_the_report_says_how_each_matrix_was_stored(tmp_path: Path) -> None:
    import_checkpoint(ASSETS / "awq", tmp_path / "o", quiet=True)
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["modules"][UP]["weight_error"] == 0
    assert report["recipe"]["modules"][0]["algorithm"]["algorithm"] == "repack"

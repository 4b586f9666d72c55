"""Checkpoints that have zeros already are stored without them and without loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.conversion.passes.zero_packing import Nonzeros
from compress_methods.errors import RecipeError
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import BLOCKS, Sparse
from vllm_compress import cli

LAYER = "model.layers.{}.{}"


def with_zeros(model: Path, out: Path, fmt_of: Any) -> Path:
    """A copy of a model whose modules keep the largest n of every m that `fmt_of(name)` says."""
    shutil.copytree(model, out)
    (file,) = out.glob("*.safetensors")
    tensors = read_tensors(file)
    for name, weight in tensors.items():
        fmt = fmt_of(name.removesuffix(".weight"))
        if fmt is not None:
            tensors[name] = weight * fmt.select(weight.float().abs())
    write_tensors(file, tensors)
    return out


def two_of_four(name: str) -> Sparse | None:
    return Sparse(2, 4, Dense()) if "_proj" in name else None


@given(st.data())
def test_the_fullest_block_of_every_size_is_found(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 9)), 4 * data.draw(st.integers(1, 65))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    share = data.draw(st.floats(0, 1))
    weight = torch.randn(rows, cols, generator=generator)
    weight *= torch.rand(rows, cols, generator=generator) < share
    found = Nonzeros(cols)
    for slab in weight.split(data.draw(st.integers(1, rows))):
        found.add(slab)
    assert set(found.most) == {m for m in BLOCKS if cols % m == 0}
    for m, most in found.most.items():
        assert most == max(
            int((weight[row, start : start + m] != 0).sum())
            for row in range(rows)
            for start in range(0, cols, m)
        )
        if most and cols % 8 == 0:
            fits = Sparse(most, m, Dense("float32"))
            assert torch.equal(fits.unpack(fits.pack(fits.nearest(weight))), weight)
    assert found.share == pytest.approx(float((weight == 0).double().mean()))


@given(st.data())
def test_16_bit_values_survive_bit_by_bit(data: st.DataObject) -> None:
    """Any bit patterns of finite values, the sign of zeros excepted."""
    m = data.draw(st.sampled_from(BLOCKS))
    fmt = Sparse(data.draw(st.integers(1, m)), m, Dense())
    rows, cols = data.draw(st.integers(1, 5)), max(m, 8) * data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    bits = torch.randint(-(2**15), 2**15, (rows, cols), dtype=torch.int16, generator=generator)
    weight = bits.view(torch.bfloat16)
    weight = torch.where(weight.isfinite(), weight, 0)
    weight = weight.where(fmt.select(torch.rand(rows, cols, generator=generator)), 0)
    out = fmt.unpack(fmt.pack(fmt.nearest(weight.float()))).bfloat16()
    expected = torch.where(weight == 0, 0, weight)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_a_pruned_checkpoint_is_packed_without_loss(novels_8m: Path, tmp_path: Path) -> None:
    """Attention 2:4, the rest half of 64; one down projection left as it was."""
    dense = LAYER.format(3, "mlp.down_proj")

    def pruned(name: str) -> Sparse | None:
        if "_proj" not in name or name == dense:
            return None
        return Sparse(2, 4, Dense()) if "attn" in name else Sparse(32, 64, Dense())

    model = with_zeros(novels_8m, tmp_path / "pruned", pruned)
    report = convert(model, "pack-sparse", tmp_path / "out", quiet=True)
    original, packed = read_entries(model), open_compressed(tmp_path / "out")
    assert list(report["unfit"]) == [dense]
    assert "0.0% zeros, but the fullest 128 columns of a row have 128" in report["unfit"][dense]
    assert len(packed.matrices) == 55
    for name, matrix in packed.matrices.items():
        weight = original[f"{name}.weight"].read()
        assert torch.equal(matrix.unpack().bfloat16(), weight)
        expected = "2:4 bfloat16" if "attn" in name else "32:64 bfloat16"
        assert matrix.format.describe() == expected
        assert report["modules"][name]["weight_error"] == 0
        assert report["modules"][name]["zeros"] == float((weight == 0).double().mean())
    assert torch.equal(packed.dense[f"{dense}.weight"].read(), original[f"{dense}.weight"].read())


def test_fused_modules_get_what_holds_them_all(novels_8m: Path, tmp_path: Path) -> None:
    keeps = {"q_proj": 1, "k_proj": 3, "v_proj": 2, "gate_proj": 2}
    model = with_zeros(
        novels_8m,
        tmp_path / "pruned",
        lambda name: (
            Sparse(keeps[leaf], 4, Dense()) if (leaf := name.rpartition(".")[2]) in keeps else None
        ),
    )
    report = convert(model, "pack-sparse", tmp_path / "out", quiet=True)
    matrices = open_compressed(tmp_path / "out").matrices
    assert {name.rpartition(".")[2] for name in matrices} == {"q_proj", "k_proj", "v_proj"}
    assert {matrix.format.describe() for matrix in matrices.values()} == {"3:4 bfloat16"}
    gate = report["unfit"][LAYER.format(0, "mlp.gate_proj")]
    assert "it shares a format with its neighbours" in gate


def test_ranks_that_share_it_bound_m(novels_8m: Path, tmp_path: Path) -> None:
    """768 columns over 12 ranks are 64 each; the larger the block, the closer n comes to half."""
    torch.manual_seed(0)
    down = Sparse(64, 128, Dense())
    model = with_zeros(
        novels_8m, tmp_path / "pruned", lambda name: down if "down_proj" in name else None
    )
    chosen = {}
    for ranks in (1, 12):
        out = tmp_path / f"out{ranks}"
        convert(model, "pack-sparse", out, tensor_parallel_size=ranks, quiet=True)
        chosen[ranks] = {x.format.describe() for x in open_compressed(out).matrices.values()}
    assert chosen[1] == {"64:128 bfloat16"}
    assert not any(":128 " in text for text in chosen[12])
    with pytest.raises(RecipeError, match="no module of pruned has zeros"):
        convert(model, "pack-sparse", tmp_path / "no", tensor_parallel_size=96, quiet=True)


def test_a_model_without_zeros_is_one_line(
    novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(novels_8m), "-o", str(out), "--recipe", "pack-sparse", "--quiet"]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no module of novels-8m has zeros that an n:m holds in fewer bytes" in line
    assert not out.exists()


def test_what_stays_dense_and_rows_of_zeros_are_told(
    novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_zeros(novels_8m, tmp_path / "pruned", two_of_four)
    (file,) = model.glob("*.safetensors")
    tensors = read_tensors(file)
    tensors[LAYER.format(2, "mlp.up_proj.weight")][5:8] = 0
    tensors[LAYER.format(1, "self_attn.o_proj.weight")] += 1
    write_tensors(file, tensors)
    out = str(tmp_path / "out")
    assert cli.main(["convert", str(model), "-o", out, "--recipe", "pack-sparse", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "left dense: model.layers.1.self_attn.o_proj: 0.0% zeros, but the fullest 128" in text
    assert "all-zero rows: 3 in 1 modules, such as model.layers.2.mlp.up_proj (3 of" in text

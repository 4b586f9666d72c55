"""Columns that no group divides: the values that count are the base's, the product is exact, and a
recipe that asks for it pads what nothing else holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, kernels
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.conversion.job import open_job
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Stored, format_from_dict
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.padded import Padded, padded_formats
from compress_methods.formats.wrappers.smaller_group import smaller_groups
from compress_methods.kernels import Want
from compress_methods.model.skeleton import build_skeleton
from tests.e2e.support.tiny import SMALL, make_model
from tests.e2e.support.zoo import ZOO

INTEGER = Integer(bits=4, group_size=32)
BASES: list[dict[str, Any]] = [
    {"format": "integer", "bits": 4, "group_size": 32},
    {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"},
    {"format": "integer", "bits": 3, "group_size": 32, "symmetric": False},
    {"format": "lookup", "bits": 4, "group_size": 32, "table": "nf4"},
    {"format": "float", "kind": "mxfp4"},
]


def stored(fmt: Any, weight: torch.Tensor) -> Stored:
    tensors = fmt.pack(fmt.nearest(weight))
    specs = fmt.tensors(*weight.shape)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    return Stored.whole(fmt, tensors, tuple(weight.shape))


@pytest.mark.parametrize("spec", BASES)
@pytest.mark.parametrize("cols", [48, 80, 161])
def test_values_and_products(spec: dict[str, Any], cols: int) -> None:
    torch.manual_seed(0)
    base = format_from_dict(spec)
    fmt = format_from_dict({"format": "padded", "base": spec, "cols": cols})
    weight, x = torch.randn(64, cols), torch.randn(5, cols)
    held = stored(fmt, weight)
    values = held.values()
    assert values.shape == weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % 32))
    assert torch.equal(values, base.unpack(base.pack(base.nearest(padded)))[:, :cols])
    assert float((values - weight).norm() / weight.norm()) < 0.25
    for name in (None, "reference"):
        prepared = kernels.prepare(held, Want(kernel=name, dtype=torch.float32))
        found = kernels.matmul(x, prepared, torch.ones(64))
        expected = fmt.quantize_activations(x) @ values.T + 1
        # Our kernels may round inputs to 8 bits where the format does not say so.
        assert float((found - expected).norm() / expected.norm()) < (1e-5 if name else 0.02)


def test_rows_are_looked_up() -> None:
    weight, ids = torch.randn(64, 80), torch.tensor([3, 63, 0])
    held = stored(Padded(INTEGER, 80), weight)
    prepared = kernels.prepare(held, Want(embed=True))
    assert torch.allclose(kernels.embed(ids, prepared, torch.float32), held.values()[ids])


def test_pieces_are_those_of_the_whole() -> None:
    held = stored(Padded(INTEGER, 80), torch.randn(64, 80))
    first, last = held.cut(cols=(0, 64)), held.cut(cols=(64, 80))
    assert torch.equal(torch.cat([first.values(), last.values()], 1), held.values())
    x = torch.randn(3, 80)
    parts = [
        kernels.matmul(part, kernels.prepare(piece, Want(kernel="cpu_exact")), None)
        for piece, part in ((first, x[:, :64].contiguous()), (last, x[:, 64:].contiguous()))
    ]
    assert torch.allclose(parts[0] + parts[1], x @ held.values().T, atol=1e-3)
    with pytest.raises(FormatError, match="cuts fall on multiples of 32"):
        held.cut(cols=(0, 40))


@pytest.mark.parametrize("spec", BASES)
@pytest.mark.parametrize("name", ["reference", "cpu_exact"])
def test_every_part_has_zeros_of_its_own(spec: dict[str, Any], name: str) -> None:
    """So ranks that share the columns each have whole groups, and add up to the whole product."""
    torch.manual_seed(0)
    base, weight, x = format_from_dict(spec), torch.randn(64, 160), torch.randn(5, 160)
    fmt = format_from_dict({"format": "padded", "base": spec, "cols": 160, "parts": 4})
    held = stored(fmt, weight)
    values = held.values()
    zeros = torch.zeros(64, 24)
    spread = torch.cat([t for part in weight.split(40, 1) for t in (part, zeros)], 1)
    kept = base.unpack(base.pack(base.nearest(spread))).unflatten(1, (4, 64))[..., :40]
    assert torch.equal(values, kept.flatten(1))
    assert fmt.alignment(64, 160)[1] == 40
    expected = fmt.quantize_activations(x) @ values.T
    for cuts in ([(0, 160)], [(0, 80), (80, 160)], [(i, i + 40) for i in range(0, 160, 40)]):
        total = torch.zeros(5, 64)
        for start, end in cuts:
            piece = held.cut(cols=(start, end))
            assert torch.equal(piece.values(), values[:, start:end])
            prepared = kernels.prepare(piece, Want(kernel=name, dtype=torch.float32))
            total += kernels.matmul(x[:, start:end].contiguous(), prepared, None)
        # Inputs that are rounded get a scale of each rank's own.
        bound = 0.02 if "activations" in spec else 1e-5
        assert float((total - expected).norm() / expected.norm()) < bound
    with pytest.raises(FormatError, match="cuts fall on multiples of 40"):
        held.cut(cols=(0, 32))


def test_ranks_that_would_cut_groups_get_zeros_where_no_smaller_group_helps(tmp_path: Path) -> None:
    odd = {**SMALL, "intermediate_size": 320, "tie_word_embeddings": False}
    model = make_model("Llama", tmp_path / "m", **odd)
    for ways, wanted in ((2, "int4 g32"), (4, "int4 g32, padded"), (8, "int4 g64, padded")):
        plan = open_job(model, recipe("rtn"), tensor_parallel_size=ways).plan
        (found,) = {j.format for j in plan.jobs if j.slot.module.endswith("down_proj")}
        assert found.describe() == wanted
        assert getattr(found, "parts", ways) == ways
        if ways < 8:
            up = {j.format.describe() for j in plan.jobs if j.slot.module.endswith("up_proj")}
            assert up == {"int4 g128"}


def test_the_fewest_added_columns_come_first() -> None:
    wide = Integer(bits=4, group_size=128)
    formats = [wide, *smaller_groups(wide)]
    found = padded_formats(formats, 2880 + 16)
    assert [fmt.padded(fmt.cols) for fmt in found] == [2912, 2944, 2944]  # type: ignore[attr-defined]
    assert found[0].base.group_size == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize(("cols", "group"), [(1152, 128), (2880, 64)])
def test_what_a_smaller_group_divides_is_not_padded(cols: int, group: int) -> None:
    from compress_methods.recipe.schema import ModuleRule

    rule: Any = ModuleRule(("blocks",), "w4", None, on_unfit="pad")  # type: ignore[arg-type]
    wide = Integer(bits=4, group_size=128)

    def fits(fmt: Any) -> bool:
        try:
            fmt.check_shape(64, cols)
        except FormatError:
            return False
        return True

    assert rule.choose(wide, fits, cols) == Integer(bits=4, group_size=group)


def test_a_base_that_prunes_is_refused() -> None:
    spec = {"format": "sparse", "n": 2, "m": 4, "values": {"format": "dense"}}
    with pytest.raises(FormatError, match="base is sparse, expected one that rounds"):
        format_from_dict({"format": "padded", "base": spec, "cols": 80})


def recipe(algorithm: str, **more: Any) -> dict[str, Any]:
    return {
        "formats": {"w4": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": "blocks", "format": "w4", "algorithm": algorithm}],
        "calibration": {"samples": 8, "length": 32, "held_out": 4},
        **more,
    }


def test_a_recipe_pads_what_nothing_else_holds(tmp_path: Path, some_text: Path) -> None:
    odd = {**SMALL, "hidden_size": 176, "vocab_size": 4096, "tie_word_embeddings": False}
    model = make_model("Llama", tmp_path / "odd", **odd)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(__file__).parents[4] / "assets" / "novels-8m" / file
        (model / file).write_bytes(source.read_bytes())
    with pytest.raises(RecipeError, match="`pad` adds columns of zeros"):
        convert(model, recipe("rtn"), tmp_path / "refused", quiet=True)
    lost = {}
    for algorithm in ("rtn", "gptq"):
        out = tmp_path / algorithm
        block = recipe(algorithm, on_unfit="pad")
        report = convert(model, block, out, calibration=some_text, quiet=True)
        lost[algorithm] = report["held_out"]["kl"]
    assert 0 < lost["gptq"] < lost["rtn"]
    kinds = {name.rpartition(".")[2]: m["format"] for name, m in report["modules"].items()}
    assert kinds["up_proj"] == kinds["q_proj"] == "int4 g64, padded"
    assert kinds["down_proj"] == kinds["o_proj"] == "int4 g128"
    found = open_compressed(out).matrices["model.layers.0.mlp.up_proj"]
    assert (found.rows, found.cols) == (256, 176)
    assert torch.equal(
        load_model(out).get_parameter("model.layers.0.mlp.up_proj.weight").data, found.unpack()
    )


def test_mambas_narrow_matrix_is_padded(tmp_path: Path) -> None:
    """vLLM gives it no quantization method, so the recipe's matrices outside vLLM are tried."""
    kind, config = ZOO["mamba"]
    model = make_model(kind, tmp_path / "mamba", **config)
    slots = build_skeleton(model).slots
    narrow = next(slot for name, slot in slots.items() if name.endswith("dt_proj"))
    assert narrow.cols == 8
    weight = torch.randn(narrow.rows, narrow.cols)
    held = stored(Padded(INTEGER, narrow.cols), weight)
    assert float((held.values() - weight).norm() / weight.norm()) < 0.15

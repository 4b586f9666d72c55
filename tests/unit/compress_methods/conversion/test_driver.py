"""What a pass is given of a model, part by part, and what becomes of what it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from compress_methods import convert
from compress_methods.algorithms import Hessian, InputNorms
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer
from compress_methods.model.skeleton import Skeleton
from compress_methods.transforms import TRANSFORMS, Outline, Part, Pass

PACKING = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
}
Run = Any


@pytest.fixture
def run(novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Converts with one pass, known for this test only, and a packing."""

    def convert_with(cls: type[Pass], *after: dict[str, Any], out: str = "out") -> dict[str, Any]:
        monkeypatch.setitem(TRANSFORMS._classes, cls.name, cls)
        recipe = {
            "stages": [{"transform": cls.name}, *after],
            "calibration": {"samples": 4, "length": 32, "held_out": 2},
        }
        return convert(novels_8m, recipe, tmp_path / out, calibration=some_text, quiet=True)

    return convert_with


def test_every_part_is_visited_in_order_with_its_slots_statistics_and_states(run: Run) -> None:
    told: list[Any] = []

    @dataclass(frozen=True)
    class Watch(Pass):
        name: ClassVar[str] = "test-watch"
        needs_teacher: ClassVar[bool] = True

        def visit(self, part: Part) -> None:
            told.append((part.index, [slot.module for slot in part.slots]))
            if part.index is None or part.index < 0:
                return
            formats: list[Format | None] = [part.packing(slot) for slot in part.slots]
            assert set(formats) == {Integer(4, 128)}
            inputs = part.inputs()
            assert inputs.shape == (4, 32, 256)
            weight = part.weight(part.slots[0])
            needs = {slot.module: (Hessian, InputNorms) for slot in part.slots}
            seen = part.statistics(needs)
            q, k = (seen[f"model.layers.{part.index}.self_attn.{n}_proj"] for n in "qk")
            assert q[Hessian] is k[Hessian]
            assert q[Hessian].tokens == 4 * 32
            norm = part.tensor(f"model.layers.{part.index}.input_layernorm.weight")
            x = inputs.reshape(-1, 256)
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
            torch.testing.assert_close(InputNorms.of(q), x.square().sum(0), rtol=1e-3, atol=1e-3)
            assert torch.equal(weight, part.weight(part.slots[0]))
            # Before anything was changed both are the same; later blocks see what packing did.
            if part.index == 0:
                torch.testing.assert_close(part.teacher(), part.forward(inputs).detach())
            else:
                assert not torch.allclose(part.teacher(), part.forward(inputs).detach(), atol=1e-5)

    run(Watch, PACKING)
    assert [index for index, _ in told] == [None, *range(8), -1]
    assert told[0][1] == ["model.embed_tokens"]
    assert told[-1][1] == ["lm_head"]
    assert all(len(slots) == 7 for _, slots in told[1:-1])


def test_what_is_replaced_is_stored_and_what_follows_is_computed_with_it(
    run: Run, novels_8m: Path, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Silence(Pass):
        """Zeroes the MLP of block 3, and doubles a norm of block 5."""

        name: ClassVar[str] = "test-silence"

        def visit(self, part: Part) -> None:
            for slot in part.slots:
                if slot.module == "model.layers.3.mlp.down_proj":
                    part.replace(slot.parameter, torch.zeros(slot.rows, slot.cols))
            if part.index == 5:
                name = "model.layers.5.post_attention_layernorm.weight"
                part.replace(name, 2 * part.tensor(name))

    report = run(Silence)
    before, after = read_entries(novels_8m), read_entries(tmp_path / "out")
    down, norm = (
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.5.post_attention_layernorm.weight",
    )
    assert not after[down].read().any()
    assert torch.equal(after[norm].read(), 2 * before[norm].read())
    assert all(
        torch.equal(after[name].read(), entry.read())
        for name, entry in before.items()
        if name not in (down, norm)
    )
    assert report["held_out"]["kl"] > 1e-3
    tokens = torch.arange(5, 60)[None]
    expected = load_model(novels_8m)
    expected.get_parameter(down).data.zero_()
    expected.get_parameter(norm).data.mul_(2)
    with torch.no_grad():
        found = load_model(tmp_path / "out")(tokens).logits
        assert torch.equal(found, expected(tokens).logits)


def test_a_pass_that_stores_another_shape_than_it_planned_is_refused(run: Run) -> None:
    @dataclass(frozen=True)
    class Narrow(Pass):
        name: ClassVar[str] = "test-narrow"

        def visit(self, part: Part) -> None:
            for slot in part.slots:
                if slot.module.endswith("2.mlp.up_proj"):
                    part.replace(slot.parameter, part.weight(slot)[:5])

    with pytest.raises(RecipeError) as caught:
        run(Narrow)
    assert str(caught.value) == (
        "test-narrow: made model.layers.2.mlp.up_proj.weight [5, 256], expected [768, 256] "
        "from its own config"
    )


def test_a_pass_that_looks_ahead_decides_on_all_blocks_before_it_visits_one(
    run: Run, tmp_path: Path
) -> None:
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Ahead(Pass):
        name: ClassVar[str] = "test-ahead"
        looks_ahead: ClassVar[bool] = True

        def survey(self, part: Part) -> list[float]:
            seen.append(("survey", part.index))
            return [float(part.weight(part.slots[0]).square().mean()), float(part.index or 0)]

        def decide(self, surveyed: Sequence[Sequence[float]]) -> Pass:
            seen.append(("decide", [row[1] for row in surveyed]))
            return self

        def visit(self, part: Part) -> None:
            seen.append(("visit", part.index))

    run(Ahead, PACKING)
    surveyed = [("survey", i) for i in range(8)]
    visited = [("visit", index) for index in (None, *range(8), -1)]
    assert seen == [*surveyed, ("decide", list(map(float, range(8)))), *visited]
    assert len(open_compressed(tmp_path / "out").matrices) == 56


def test_matrices_stored_as_another_layers_are_stored_once(
    run: Run, novels_8m: Path, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Share(Pass):
        """Layer 4's MLP is layer 3's."""

        name: ClassVar[str] = "test-share"

        def plan(self, skeleton: Skeleton) -> Outline:
            return Outline(aliases={"model.layers.4.mlp": "model.layers.3.mlp"})

    run(Share, PACKING)
    checkpoint = open_compressed(tmp_path / "out")
    assert len(checkpoint.matrices) == 53
    leaves = ("gate_proj", "up_proj", "down_proj")
    tied = {f"model.layers.4.mlp.{leaf}": f"model.layers.3.mlp.{leaf}" for leaf in leaves}
    assert checkpoint.spec.tied == tied
    loaded = load_model(tmp_path / "out")
    weights: list[list[Tensor]] = [
        [loaded.get_parameter(f"model.layers.{i}.mlp.{leaf}.weight") for leaf in leaves]
        for i in (3, 4)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    q = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(*(loaded.get_parameter(q.format(i)) for i in (3, 4)))


def test_an_alias_of_a_later_matrix_is_refused(run: Run) -> None:
    @dataclass(frozen=True)
    class Backwards(Pass):
        name: ClassVar[str] = "test-backwards"

        def plan(self, skeleton: Skeleton) -> Outline:
            return Outline(aliases={"model.layers.2.mlp": "model.layers.3.mlp"})

    with pytest.raises(RecipeError, match=r"layers\.2\.mlp.*cannot be stored as.*come before it"):
        run(Backwards, PACKING)

"""Dividing the bytes of a sparse format among layers."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from compress_methods import convert
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.pruning.wanda import Wanda
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.conversion.job import open_job
from compress_methods.conversion.passes import allocation
from compress_methods.conversion.passes.allocation import (
    AllocatedPacking,
    Group,
    choose,
    outputs,
    spread,
)
from compress_methods.conversion.planning.plan import Job
from compress_methods.errors import FormatError, OutputError, RecipeError
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.model.slot import Slot
from compress_methods.recipe.schema import load_recipe
from tests.robustness.result import contents
from tests.unit.compress_methods.algorithms.test_rotated import gathered, heavy

SMALL = {"samples": 4, "length": 64, "held_out": 2}
INT4 = {"format": "integer", "bits": 4, "group_size": 128}


def recipe(n: int = 64, m: int = 128, algorithm: Any = "wanda", **more: Any) -> dict[str, Any]:
    values = more.pop("values", {"format": "dense"})
    return {
        "formats": {"s": {"format": "sparse", "n": n, "m": m, "values": values}},
        "modules": [{"match": "blocks", "format": "s", "algorithm": algorithm, **more}],
        "calibration": SMALL,
    }


def group(rows: int) -> Group:
    choices = tuple(Sparse(n, 128, Dense()) for n in (32, 48, 64, 80, 96))
    job = Job(Slot("m", "m.weight", "blocks", rows, 256), "s", choices[2], Wanda(), choices)
    return Group(0, (job,), choices)


falls = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=4, max_size=4)


def falling(drops: list[float], convex: bool) -> list[float]:
    drops = sorted(drops, reverse=True) if convex else drops
    return [sum(drops[i:]) for i in range(5)]


def spent(groups: list[Group], picked: Any) -> int:
    return sum(g.sizes[i] for g, i in zip(groups, picked, strict=True))


def lost(errors: list[list[float]], picked: Any) -> float:
    return sum(e[i] for e, i in zip(errors, picked, strict=True))


@given(st.lists(st.tuples(falls, st.sampled_from((8, 16, 40))), min_size=1, max_size=6))
def test_the_choice_costs_no_more_bytes_and_no_more_error_than_the_same_n_everywhere(
    drawn: list[tuple[list[float], int]],
) -> None:
    groups = [group(rows) for _, rows in drawn]
    errors = [falling(drops, convex=False) for drops, _ in drawn]
    picked = choose(errors, groups)
    uniform = [2] * len(groups)
    assert spent(groups, picked) <= spent(groups, uniform)
    assert lost(errors, picked) <= lost(errors, uniform)


@given(st.lists(falls, min_size=1, max_size=4))
@example([[0.0, 0.0, 0.0, 1.0], [1.0, 0.75, 0.75, 0.3928464444696401]])
@example([[0.0] * 4, [1.0] * 4, [1.0, 0.0078125, 0.01, 0.01]])
def test_the_choice_is_the_best_there_is_where_errors_fall_ever_more_slowly(
    drawn: list[list[float]],
) -> None:
    groups = [group(8) for _ in drawn]
    errors = [falling(drops, convex=True) for drops in drawn]
    budget = spent(groups, [2] * len(groups))
    best = min(
        lost(errors, picked)
        for picked in product(range(5), repeat=len(groups))
        if spent(groups, picked) <= budget
    )
    assert lost(errors, choose(errors, groups)) == pytest.approx(best, abs=1e-9)


def test_layers_get_different_n_in_the_same_bytes_and_a_stopped_run_goes_on(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = recipe(allocate="output_error")
    whole, out = tmp_path / "whole", tmp_path / "out"
    report = convert(novels_8m, allocated, whole, calibration=some_text, quiet=True)
    checkpoint = open_compressed(whole)
    counts = {name: matrix.format.n for name, matrix in checkpoint.matrices.items()}  # type: ignore[attr-defined]
    assert len(set(counts.values())) > 2
    for name, n in counts.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(first):
                assert all(counts[name.replace(first, other)] == n for other in others)
    planned = open_job(novels_8m, recipe()).plan.compressed_bytes
    assert 0.98 * planned < report["bytes_after"] <= planned
    assert report["bytes_after"] == sum(m.nbytes for m in checkpoint.matrices.values()) + sum(
        entry.nbytes for entry in checkpoint.dense.values()
    )

    measure = AllocatedPacking.survey

    def stopped(self: AllocatedPacking, part: Any) -> list[float]:
        if part.index == 5:
            raise KeyboardInterrupt
        return measure(self, part)

    monkeypatch.setattr(AllocatedPacking, "survey", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(novels_8m, allocated, out, calibration=some_text, quiet=True)
    seen = []

    def watched(self: AllocatedPacking, part: Any) -> list[float]:
        seen.append(part.index)
        return measure(self, part)

    monkeypatch.setattr(AllocatedPacking, "survey", watched)
    with pytest.raises(OutputError, match="another model, recipe"):
        convert(novels_8m, recipe(), out, calibration=some_text, quiet=True)
    convert(novels_8m, allocated, out, calibration=some_text, quiet=True)
    assert seen == [5, 6, 7]
    assert contents(out) == contents(whole)


def test_errors_are_those_of_the_whole_text_not_of_its_first_batch(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def recorded(part: Any, inputs: torch.Tensor) -> torch.Tensor:
        measured.append(inputs)
        return outputs(part, inputs)

    monkeypatch.setattr(allocation, "outputs", recorded)
    asked = recipe(allocate="output_error")
    convert(novels_8m, asked, tmp_path / "out", calibration=some_text, quiet=True)
    assert {len(inputs) for inputs in measured} == {SMALL["samples"]}
    assert spread(torch.arange(64)).tolist() == list(range(0, 64, 4))
    assert spread(torch.arange(17)).tolist() == list(range(0, 17, 2))


def test_only_what_ranks_can_cut_is_chosen_from(novels_8m: Path) -> None:
    allocated = recipe(
        allocate="output_error", values={"format": "integer", "bits": 8, "group_size": -1}
    )
    for ways in (1, 2):
        job = open_job(novels_8m, allocated, tensor_parallel_size=ways)
        down = [found for found in job.plan.jobs if found.slot.module.endswith("down_proj")]
        assert len(down) == 8
        for found in down:
            assert found.format in found.choices
            shards = [c.alignment(found.slot.rows, found.slot.cols)[1] for c in found.choices]
            assert all(found.slot.cols // ways % shard == 0 for shard in shards)
            assert len(shards) > 1 or ways > 1


def test_the_old_name_of_allocation_is_still_read() -> None:
    old, new = load_recipe(recipe(split="error")), load_recipe(recipe(allocate="output_error"))
    assert old.modules[0].allocate
    assert old == new
    assert old.sha256 == new.sha256 != load_recipe(recipe()).sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocate": "evenly"}, "allocate is 'evenly', expected output_error"),
        ({"split": "evenly"}, "split is 'evenly', expected error"),
        (
            {"allocate": "output_error", "algorithm": "magnitude"},
            "calibration shows.*'magnitude'",
        ),
        (
            {"allocate": "output_error", "values": INT4},
            "no other n for format 's'.*smaller group_size",
        ),
    ],
)
def test_an_allocation_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, novels_8m: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        open_job(novels_8m, recipe(**changes))


def test_a_pattern_no_matrix_can_hold_is_refused(novels_8m: Path) -> None:
    with pytest.raises((RecipeError, FormatError), match=r"o_proj|q_proj|down_proj"):
        open_job(novels_8m, recipe(63, 128, allocate="output_error", values=INT4))


def test_a_rotated_choice_is_measured_as_it_is_packed() -> None:
    """In its own basis: with the statistics of unturned inputs it would be rounded for others."""
    fmt, weight, seen = Rotated(Integer(3, 64)), torch.randn(64, 320), gathered(heavy(500, 320))
    slot = Slot("m", "m.weight", "blocks", 64, 320)
    job = Job(slot, "r", fmt, GPTQ(), (fmt, Integer(4, 64)), variants=("r", "w4"))
    skeleton = SimpleNamespace(module=lambda name: torch.nn.Linear(320, 64))
    into = weight.clone()
    part = SimpleNamespace(weight=lambda slot: into, planned=SimpleNamespace(skeleton=skeleton))
    with ExitStack() as stack:
        allocation._fill(part, Group(0, (job,), job.choices), fmt, {"m": seen}, [weight], stack)  # type: ignore[arg-type]
    packed = fmt.pack(GPTQ().fill(weight, GPTQ().ready(seen, fmt), fmt))
    assert torch.equal(into, fmt.unpack(packed))

"""Formats chosen by measured sensitivity, within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.conversion.job import open_job
from compress_methods.conversion.passes.allocation import AllocatedPacking
from compress_methods.conversion.resources import estimate
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import RecipeError
from compress_methods.recipe import stages
from compress_methods.recipe.budget import Budget
from compress_methods.recipe.stages import load_staged
from compress_methods.search.prune_to import find_levels
from tests.robustness.result import contents

SMALL = {"samples": 4, "length": 64, "held_out": 2}
ONE_PASS = {"algorithm": "gptq", "sweeps": 0}


def recipe(budget: Any, formats: Any = ("w2", "w3", "w4"), **more: Any) -> dict[str, Any]:
    rule = {"match": "blocks", "format": list(formats), "algorithm": more.pop("algorithm", "rtn")}
    return {
        "formats": {
            **{f"w{b}": {"format": "integer", "bits": b, "group_size": 128} for b in (2, 3, 4)},
            "full": {"format": "dense"},
        },
        "modules": [rule],
        **({} if budget is None else {"budget": budget}),
        "calibration": SMALL,
        **more,
    }


def stored(out: Path) -> dict[str, int]:
    """Bits of every matrix."""
    return {name: m.format.bits for name, m in open_compressed(out).matrices.items()}  # type: ignore[attr-defined]


def held_bytes(out: Path) -> int:
    """Of all tensors, as the files' headers say."""
    found = open_compressed(out)
    return sum(m.nbytes for m in found.matrices.values()) + sum(
        entry.nbytes for entry in found.dense.values()
    )


@pytest.fixture(scope="module")
def three_bits(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("budget") / "out"
    wanted = recipe({"bits": 3.1}, algorithm=ONE_PASS)
    return out, convert(novels_8m, wanted, out, calibration=some_text, quiet=True)


def test_groups_get_formats_of_their_own_in_no_more_bits_than_there_are(three_bits: Any) -> None:
    out, report = three_bits
    bits = stored(out)
    assert set(bits.values()) == {2, 3, 4}
    for name, mine in bits.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(first):
                assert all(bits[name.replace(first, other)] == mine for other in others)
    assert 3.05 < report["compressed_bits_per_weight"] <= 3.1
    assert report["bytes_after"] == held_bytes(out)
    packed = sum(m.nbytes for m in open_compressed(out).matrices.values())
    assert packed <= report["budget"]["allowed_bytes"]
    assert report["budget"]["predicted_kl"] > 0


def test_a_plan_knows_the_most_that_can_come_out(three_bits: Any, novels_8m: Path) -> None:
    _, report = three_bits
    planned = open_job(novels_8m, recipe({"bits": 3.1}, algorithm=ONE_PASS)).plan
    assert 0.99 * planned.compressed_bytes < report["bytes_after"] <= planned.compressed_bytes
    everything = open_job(novels_8m, recipe({"bits": 16})).plan
    assert everything.compressed_bytes == open_job(novels_8m, "int4-rtn").plan.compressed_bytes


def test_what_is_carried_counts_in_memory_and_on_disk(novels_8m: Path) -> None:
    wanted = recipe({"bits": 3.1}, algorithm=ONE_PASS)
    single = {**wanted, "modules": [{"match": "blocks", "format": "w3", "algorithm": ONE_PASS}]}
    del single["budget"]
    found = []
    for each in (wanted, single):
        planned = open_job(novels_8m, each)
        needed = estimate(planned.plan, planned.skeleton, True)
        found.append((needed.memory, needed.disk - planned.plan.compressed_bytes))
    groups, sequences = 32, SMALL["samples"]
    carried = groups * sequences * SMALL["length"] * 256 * 4
    assert found[0][0] - found[1][0] > 0.99 * carried  # and packed blocks, which hardly differ
    assert found[0][1] - found[1][1] == 2 * carried


def test_what_is_measured_beats_a_choice_at_random(
    three_bits: Any, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """The formats of one layer given to another, in as many bytes."""
    out, report = three_bits
    rules = [
        {
            "match": name.replace(f"layers.{layer}.", f"layers.{7 - layer}."),
            "format": f"w{bits}",
            "algorithm": ONE_PASS,
        }
        for name, bits in stored(out).items()
        for layer in [int(name.split(".")[2])]
    ]
    turned = {**recipe(None), "modules": rules}
    other = convert(novels_8m, turned, tmp_path / "out", calibration=some_text, quiet=True)
    assert other["bytes_after"] == report["bytes_after"]
    assert report["held_out"]["kl"] < other["held_out"]["kl"]


def test_a_stopped_survey_goes_on_with_what_it_carried(
    three_bits: Any,
    novels_8m: Path,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = AllocatedPacking.survey
    seen = []

    def stopped(self: AllocatedPacking, part: Any) -> list[float]:
        seen.append(part.index)
        if part.index == 3 and len(seen) == 4:
            raise KeyboardInterrupt
        return measure(self, part)

    monkeypatch.setattr(AllocatedPacking, "survey", stopped)
    wanted, out = recipe({"bits": 3.1}, algorithm=ONE_PASS), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(novels_8m, wanted, out, calibration=some_text, quiet=True)
    convert(novels_8m, wanted, out, calibration=some_text, quiet=True)
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert contents(out) == contents(three_bits[0])


def test_a_size_is_that_of_all_tensors(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(novels_8m, recipe({"size": "6.4MB"}), out, calibration=some_text, quiet=True)
    assert 0.97 * 6.4e6 < held_bytes(out) <= 6.4e6
    assert report["bytes_after"] == held_bytes(out)


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("38%", 380_000), ("6.4MB", 6_400_000), ("6.5 MiB", 6_815_744), (6_000_000, 6_000_000)],
)
def test_sizes_are_decimal_binary_shares_or_bytes(size: Any, bytes_: int) -> None:
    budget = Budget(size=size)
    assert budget.packed(weights=1, besides=1000, original=1_000_000) == bytes_ - 1000


def test_a_bound_on_kl_is_met_by_the_smallest_that_does(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys = []
    measure = AllocatedPacking.survey

    def counted(self: AllocatedPacking, part: Any) -> list[float]:
        surveys.append(part.index)
        return measure(self, part)

    monkeypatch.setattr(AllocatedPacking, "survey", counted)
    monkeypatch.setattr(stages, "BUDGET_STEPS", 6)
    out = tmp_path / "out"
    report = convert(novels_8m, recipe({"kl": 0.1}), out, calibration=some_text, quiet=True)
    assert surveys == list(range(8))  # once for all levels
    points = {point["level"]: point for point in report["search"]["points"]}
    chosen = points[report["search"]["level"]]
    assert chosen["kl"] == pytest.approx(report["search"]["chosen_on"]["kl"])
    assert chosen["kl"] <= 0.1
    assert chosen["bytes"] == report["bytes_after"] == held_bytes(out)
    further = [p for level, p in points.items() if level > report["search"]["level"]]
    assert further
    assert all(p["kl"] > 0.1 for p in further)
    assert (out / "curve.png").exists()


def test_levels_of_a_bound_on_kl_reach_from_all_to_nothing(novels_8m: Path) -> None:
    staged = load_staged(recipe({"kl": 0.1}))
    levels = find_levels(staged, (novels_8m, False, 1))
    least, most = (
        open_job(novels_8m, {**recipe(None), "modules": [{"match": "blocks", "format": name}]}).plan
        for name in ("w2", "w4")
    )
    assert (levels[0].bytes, levels[-1].bytes) == (most.compressed_bytes, least.compressed_bytes)
    for level in levels[:: len(levels) - 1]:
        plan = open_stages(novels_8m, level.recipe)[-1].planned.plan
        assert plan.compressed_bytes == level.bytes


def test_a_kl_that_no_format_meets_is_refused(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "BUDGET_STEPS", 2)
    with pytest.raises(RecipeError, match=r"a KL of 1e-06 cannot be met; the best, at level 0%"):
        convert(
            novels_8m, recipe({"kl": 1e-6}), tmp_path / "out", calibration=some_text, quiet=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"bits": 3, "size": "1GB"}}, r"budget: expected one of bits, size, kl"),
        ({"budget": {}}, "budget: expected one of"),
        ({"budget": {"bit": 3}}, "unknown key 'bit'.*'bits'"),
        ({"budget": {"bits": -1}}, "bits is -1, expected more than 0"),
        ({"budget": {"size": "4.2 gigs"}}, "size is '4.2 gigs', expected bytes such as 4.2GB"),
        ({"budget": {"size": "120%"}}, "size is '120%'"),
        ({"budget": {"bits": 2}}, r"budget \{'bits': 2\} cannot be met.*take 2.12 bits a weight"),
        ({"formats": ("w3", "full")}, "'full' is dense, which is not compressed"),
        ({"formats": ("w3", "w3")}, r"format is \['w3', 'w3'\], expected a name or several"),
        ({"formats": ("w3", "w5")}, "unknown format 'w5'"),
        ({"budget": {"kl": 0.1}, "calibration": {"held_out": 1}}, "budget.kl chooses by one half"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, novels_8m: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        open_job(novels_8m, recipe(**{"budget": {"bits": 3}, **changes}))


def test_lists_and_budgets_need_each_other_and_matrices_that_are_measured(novels_8m: Path) -> None:
    block = recipe({"bits": 3})
    single = {**block, "modules": [{"match": "blocks", "format": "w3"}]}
    with pytest.raises(RecipeError, match="no entry of modules has a list of formats"):
        open_job(novels_8m, single)
    del block["budget"]
    with pytest.raises(RecipeError, match="format is a list, so `budget"):
        open_job(novels_8m, block)
    parted = recipe({"bits": 3})
    parted["modules"].insert(0, {"match": "re:.*k_proj", "format": "w2"})
    with pytest.raises(RecipeError, match=r"q_proj\+k_proj\+v_proj: run as one.*needs a list"):
        open_job(novels_8m, parted)
    table = recipe({"bits": 3})
    table["modules"].append({"match": "embedding", "format": ["w3", "w4"]})
    with pytest.raises(RecipeError, match="only matrices of the decoder blocks are measured"):
        open_job(novels_8m, table)

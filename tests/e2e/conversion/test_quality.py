"""What compression may cost: calibrated on one half of a text, measured on the other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.evaluation.offline import evaluate
from tests.benchmarks.speed import sparse_cases
from tests.benchmarks.speed.sparse_cases import FIFTY, INT4, SEVENTY, TWO_FOUR, sparse

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
TOKENS = 4096
CALIBRATION = {"samples": 8, "length": 512, "held_out": 0}
MOST_OF_RTN = {4: 0.40, 3: 0.40, 2: 0.32}
KL = Callable[..., float]


@pytest.fixture(scope="module")
def halves(validation_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of the same novels: to calibrate on, and to measure on."""
    text = validation_text.read_text(encoding="utf-8")
    middle = len(text) // 2
    folder = tmp_path_factory.mktemp("text")
    first, second = folder / "first.txt", folder / "second.txt"
    first.write_text(text[:middle], encoding="utf-8")
    second.write_text(text[middle:], encoding="utf-8")
    return first, second


@pytest.fixture(scope="module")
def kl(novels_8m: Path, halves: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> KL:
    """KL of a recipe to the original, measured once."""
    sparse_cases.with_unstructured()
    found: dict[str, float] = {}

    def measure(recipe: dict[str, Any], model: Path = novels_8m, samples: int = 8) -> float:
        key = f"{model} {samples} {recipe}"
        if key not in found:
            out = tmp_path_factory.mktemp("quality") / "out"
            calibrated = {**recipe, "calibration": {**CALIBRATION, "samples": samples}}
            convert(model, calibrated, out, calibration=halves[0], quiet=True)
            found[key] = evaluate(out, novels_8m, halves[1], limit_tokens=TOKENS).kl
            shutil.rmtree(out)
            print(f"{found[key]:.5f} nats: {recipe}")
        return found[key]

    return measure


def integer(bits: int, group_size: int, algorithm: str) -> dict[str, Any]:
    return {
        "formats": {"w": {"format": "integer", "bits": bits, "group_size": group_size}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
    }


def test_int8_is_as_good_as_the_original(kl: KL) -> None:
    assert kl(integer(8, -1, "rtn")) < 0.0002


@pytest.mark.parametrize("bits", MOST_OF_RTN)
def test_gptq_loses_a_fraction_of_what_rounding_loses(bits: int, kl: KL) -> None:
    """Group 128, symmetric, no clipping search in either."""
    assert kl(integer(bits, 128, "gptq")) <= MOST_OF_RTN[bits] * kl(integer(bits, 128, "rtn"))


@pytest.mark.parametrize("pattern", [FIFTY, TWO_FOUR])
def test_wanda_loses_less_than_magnitude_and_sparsegpt_least(
    pattern: tuple[int, int], kl: KL
) -> None:
    magnitude, wanda, sparsegpt = (
        kl(sparse(pattern, name)) for name in ("magnitude", "wanda", "sparsegpt")
    )
    assert sparsegpt < wanda < magnitude


def test_alps_loses_less_than_sparsegpt_at_70_percent(kl: KL) -> None:
    assert kl(sparse(SEVENTY, "alps")) < kl(sparse(SEVENTY, "sparsegpt"))


def test_blocks_of_128_lose_little_to_a_free_choice_in_each_row(kl: KL) -> None:
    """At the same sparsity: n of 128 divided among layers, against half of each row."""
    free = kl(sparse(FIFTY, "alps", kind="unstructured"), samples=4)
    assert kl(sparse(FIFTY, "alps", allocate="output_error"), samples=4) <= 1.05 * free


def test_one_pass_loses_no_more_than_sparsegpt_and_then_gptq(
    kl: KL, novels_8m: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    """For the algorithm itself and for the recipe that is shipped."""
    pruned, second = sparse_cases.two_passes(novels_8m, tmp_path, halves[0], CALIBRATION)
    afterwards = kl(second, pruned)
    assert kl(sparse(FIFTY, "sparsegpt", INT4)) <= 1.02 * afterwards
    shipped = {"algorithm": "alps", "clip": True}
    assert kl(sparse(FIFTY, shipped, INT4)) <= 1.02 * afterwards

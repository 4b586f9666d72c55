"""What compression may cost, on text the model has not seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.conversion import pipeline
from compress_methods.conversion.calibration import CalibrationSettings
from compress_methods.conversion.sampling import sample_from_model
from compress_methods.evaluate import evaluate, load_tokenizer
from tests.benchmarks import sparse_cases
from tests.benchmarks.sparse_cases import FIFTY, INT4, SEVENTY, TWO_FOUR, sparse

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
TOKENS = 20_000
SPARSE_TOKENS = 10_000
MOST_OF_RTN = {4: 0.40, 3: 0.40, 2: 0.32}
SETTINGS = CalibrationSettings(samples=64, length=512)
FEWER = CalibrationSettings(samples=32, length=512)


@pytest.fixture(scope="module")
def sampled(novels_8m: Path) -> torch.Tensor:
    """The calibration text every GPTQ conversion here uses: 64 x 512 tokens by the model itself."""
    source = pipeline.open_job(novels_8m, "int4-gptq").source
    return sample_from_model(source, load_tokenizer(novels_8m), SETTINGS)


@pytest.fixture
def kl(
    novels_8m: Path,
    validation_text: Path,
    tmp_path: Path,
    sampled: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setattr(pipeline, "sample_from_model", lambda *_: sampled)

    def measure(bits: int, group_size: int, algorithm: Any) -> float:
        out = tmp_path / f"{bits}-{group_size}-{algorithm}"
        recipe = {
            "formats": {"w": {"format": "integer", "bits": bits, "group_size": group_size}},
            "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
            "calibration": {"samples": SETTINGS.samples, "length": SETTINGS.length},
        }
        convert(novels_8m, recipe, out, quiet=True)
        return evaluate(out, novels_8m, validation_text, limit_tokens=TOKENS).kl

    return measure


def test_int8_is_as_good_as_the_original(kl: Any) -> None:
    assert kl(8, -1, "rtn") < 0.0002


@pytest.mark.parametrize("bits", MOST_OF_RTN)
def test_gptq_loses_a_fraction_of_what_rounding_loses(bits: int, kl: Any) -> None:
    """Group 128, symmetric, no clipping search in either."""
    assert kl(bits, 128, "gptq") <= MOST_OF_RTN[bits] * kl(bits, 128, "rtn")


@pytest.fixture(scope="module")
def sparse_kl(
    novels_8m: Path,
    validation_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    sampled: torch.Tensor,
) -> Any:
    """KL of a sparse recipe, measured once; half the calibration text, to save time."""
    sparse_cases.with_unstructured()
    found: dict[str, float] = {}

    def measure(recipe: dict[str, Any], model: Path = novels_8m) -> float:
        key = f"{model} {recipe}"
        if key not in found:
            out = tmp_path_factory.mktemp("sparse") / "out"
            settings = {"samples": FEWER.samples, "length": FEWER.length, "held_out": 0}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "sample_from_model", lambda *_: sampled[: FEWER.samples])
                convert(model, {**recipe, "calibration": settings}, out, quiet=True)
            found[key] = evaluate(out, novels_8m, validation_text, limit_tokens=SPARSE_TOKENS).kl
            shutil.rmtree(out)
        return found[key]

    return measure


@pytest.mark.parametrize("pattern", [FIFTY, TWO_FOUR])
def test_wanda_loses_less_than_magnitude_and_sparsegpt_least(
    pattern: tuple[int, int], sparse_kl: Any
) -> None:
    magnitude, wanda, sparsegpt = (
        sparse_kl(sparse(pattern, name)) for name in ("magnitude", "wanda", "sparsegpt")
    )
    assert sparsegpt < wanda < magnitude


def test_alps_loses_less_than_sparsegpt_at_70_percent(sparse_kl: Any) -> None:
    assert sparse_kl(sparse(SEVENTY, "alps")) < sparse_kl(sparse(SEVENTY, "sparsegpt"))


def test_blocks_of_128_lose_little_to_a_free_choice_in_each_row(sparse_kl: Any) -> None:
    free = sparse_kl(sparse(FIFTY, "alps", kind="unstructured"))
    assert sparse_kl(sparse(FIFTY, "alps")) <= 1.05 * free


def test_one_pass_loses_no_more_than_sparsegpt_and_then_gptq(
    sparse_kl: Any,
    novels_8m: Path,
    tmp_path: Path,
    sampled: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the algorithm itself and for the recipe that is shipped."""
    monkeypatch.setattr(pipeline, "sample_from_model", lambda *_: sampled)
    pruned, second = sparse_cases.two_passes(novels_8m, tmp_path)
    afterwards = sparse_kl(second, pruned)
    assert sparse_kl(sparse(FIFTY, "sparsegpt", INT4)) <= 1.02 * afterwards
    shipped = {"algorithm": "alps", "clip": True}
    assert sparse_kl(sparse(FIFTY, shipped, INT4)) <= 1.02 * afterwards

"""What compression may cost, on text the model has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.conversion import pipeline
from compress_methods.conversion.calibration import CalibrationSettings
from compress_methods.conversion.sampling import sample_from_model
from compress_methods.evaluate import evaluate, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
TOKENS = 20_000
MOST_OF_RTN = {4: 0.40, 3: 0.40, 2: 0.32}
SETTINGS = CalibrationSettings(samples=64, length=512)


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

"""A model is loaded in the dtype that fits, and refused before it is loaded where none does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.evaluation import fit


@pytest.mark.parametrize(("free", "dtype"), [(10**8, torch.float32), (6 * 10**7, torch.bfloat16)])
def test_float32_is_used_where_it_fits_twice(
    free: int, dtype: torch.dtype, novels_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda: free)
    assert fit.loading_dtype([novels_8m], "") is dtype


def test_what_does_not_fit_is_refused_with_sizes_and_advice(
    novels_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda: 10 * 2**20)
    with pytest.raises(CalibrationError) as caught:
        fit.loading_dtype([novels_8m, novels_8m], "rent more")
    name = novels_8m.name
    values = sum(fit.parameters(novels_8m).values())
    weights = f"{2 * 2 * values / 2**20:.1f} MiB"
    expected = f"{name} and {name}: {weights} of weights do not fit 10.0 MiB of free memory"
    assert str(caught.value) == f"{expected}; rent more"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        fit.parameters(tmp_path / "nowhere")

"""What a calibration makes of measured steps, and what becomes of it in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_compress.operations.capacity.calibration.fit import (
    Calibration,
    CalibrationSourceError,
    read_calibration,
    step_model,
    to_json,
)
from vllm_compress.operations.capacity.footprint.memory import Layout
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import Scheme, apply_recipe, as_it_is
from vllm_compress.operations.capacity.hardware import (
    find_hardware,
)
from vllm_compress.operations.capacity.throughput.performance import (
    roofline,
)

H100 = find_hardware("h100-80gb")
LLAMA = load_shape("llama-3.1-8b")


def scheme(recipe: str | None) -> Scheme:
    return as_it_is(LLAMA) if recipe is None else apply_recipe(LLAMA, recipe)


def calibration(**changes: Any) -> Calibration:
    known: dict[str, Any] = {
        "source": "requests",
        "url": "http://localhost:8000",
        "model": "nowhere",
        "machine": {"key": "h100-sxm"},
        "weight_bytes": scheme(None).weight_bytes,
        "tokens": [[1, 0.01], [8, 0.012], [64, 0.02], [512, 0.1]],
        "head": [[1, 0.0], [8, 0.001]],
        "per_context": 1e-8,
        "per_pair": 1e-9,
        "request_seconds": 0.005,
    }
    return Calibration(**{**known, **changes})


def test_what_was_measured_is_planned_as_measured() -> None:
    step, basis = step_model(scheme(None), H100, Layout(), 2, calibration(), scheme(None))
    assert basis == "measured"
    assert step.seconds(8, 8, 1e5, 0) == pytest.approx(0.012 + 0.001 + 1e-3)
    assert step.seconds(960, 1, 0, 1e6) == pytest.approx(0.1 + 0.08 + 1e-3)


def test_other_schemes_on_the_hardware_are_corrected_alike() -> None:
    """Twice as slow as its roofline there: twice as slow here."""
    plain = roofline(scheme(None), H100, Layout())
    points = [[n, 2 * plain.seconds(n, 1, 0, 0)] for n in (1, 4, 16, 64, 256, 1024)]
    found = calibration(tokens=points, head=[[1, 0.0]])
    step, basis = step_model(scheme("int4-gptq"), H100, Layout(2), 2, found, scheme(None))
    assert basis == "scaled"
    own = roofline(scheme("int4-gptq"), H100, Layout(2))
    assert step.seconds(64, 1, 0, 0) == pytest.approx(2 * own.seconds(64, 1, 0, 0), rel=1e-6)


def test_other_hardware_keeps_its_roofline() -> None:
    l4 = find_hardware("l4")
    step, basis = step_model(scheme(None), l4, Layout(), 2, calibration(), scheme(None))
    assert basis == "roofline"
    assert step == roofline(scheme(None), l4, Layout())


def test_single_requests_tell_the_step_they_were_made_of() -> None:
    """Timings made up by a law are taken apart into it again."""
    from vllm_compress.operations.capacity.calibration.measure import (
        TOKENS_OUT,
        Timings,
        numbers,
    )

    def step(n: int) -> float:
        return 0.05 + 0.004 * n

    overhead, head, context = 0.007, 0.002, 1e-5
    lengths = (1, 2, 4, 8, 16, 64, 256)
    timings = Timings(
        steps={n: overhead + step(n) for n in lengths},
        heads={n: 0.001 + head * (n - 1) for n in (2, 3, 5, 9)},
        decode={c: step(1) + context * (c + TOKENS_OUT / 2) for c in (1, 100, 200)},
    )
    found = calibration(**numbers(timings))
    assert found.request_seconds == pytest.approx(overhead)
    assert found.per_context == pytest.approx(context)
    step_of, _ = step_model(scheme(None), H100, Layout(), 2, found, None)
    for n in (1, 3, 8):
        assert step_of.seconds(n, n, 0, 0) == pytest.approx(step(n) + head * (n - 1))


@pytest.mark.parametrize("jump", [-0.04, 0.04])
def test_a_change_of_kernel_at_some_number_of_tokens_is_planned_where_it_is(jump: float) -> None:
    """Also where more tokens take less time."""

    def step(n: float) -> float:
        return 0.05 + 0.01 * n + (jump if n >= 8 else 0.0)

    points = [[n, step(n)] for n in (16, 8, 1, 7, 4)]
    found = calibration(tokens=points, head=[[1, 0.0]])
    step_of, _ = step_model(scheme(None), H100, Layout(), 2, found, None)
    for n in (1, 2, 4, 7, 8, 12, 16, 40):
        assert step_of.seconds(n, n, 0, 0) == pytest.approx(step(n))


def test_disturbed_measurements_are_averaged() -> None:
    """Less than another kernel would make of it, and differences on either side of nothing."""
    points = [[1, 0.1], [4, 0.13], [8, 0.11], [16, 0.2]]
    found = calibration(tokens=points, head=[[1, 0.0], [4, 0.004], [8, -0.004], [16, 0.01]])
    step_of, _ = step_model(scheme(None), H100, Layout(), 2, found, None)
    for n, seconds in ((1, 0.1), (4, 0.12), (8, 0.12), (16, 0.21)):
        assert step_of.seconds(n, n, 0, 0) == pytest.approx(seconds)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    noisy = calibration(head=[[1, 0.0], [2, -0.00004], [8, 0.01]])
    for written in (calibration(), noisy):
        path.write_text(to_json(written))
        assert read_calibration(path) == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable as JSON"),
        ("[]", "version is 'list'"),
        ('{"version": 7}', "version is 7"),
        ('{"version": 1, "model": "m"}', "missing key"),
        (None, "no such file"),
    ],
)
def test_broken_calibration_files_are_named(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CalibrationSourceError, match=words) as error:
        read_calibration(path)
    assert "c.json" in str(error.value)


def test_a_calibration_without_points_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    block = json.loads(to_json(calibration()))
    path.write_text(json.dumps({**block, "tokens": []}))
    with pytest.raises(CalibrationSourceError, match="no measurements"):
        read_calibration(path)

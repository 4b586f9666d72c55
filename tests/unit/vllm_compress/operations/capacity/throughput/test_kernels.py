"""Kernels of GPUs: none on a card that lacks it, no rate that its units lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.tensor_train import TensorTrain
from compress_methods.formats.trellis import Trellis
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from vllm_compress.operations.capacity.hardware import find_hardware, hardware_names
from vllm_compress.operations.capacity.throughput import kernels
from vllm_compress.operations.capacity.throughput.kernels import (
    KernelError,
    kernel_notes,
    kernel_of,
)
from vllm_compress.operations.capacity.throughput.performance import compute_rate, dense_rate

W8A8 = Integer(8, -1, activations="int8")
FP8_BOTH = Float("fp8", activations="fp8")
FORMATS: dict[str, Format | None] = {
    "kept": None,
    "int4": Integer(4, 128),
    "int4, zeros": Integer(4, 128, symmetric=False),
    "int8": Integer(8, 128),
    "int3": Integer(3, 128),
    "int2 mid": Integer(2, 128, levels="mid"),
    "w8a8": W8A8,
    "fp8": Float("fp8"),
    "fp8, both": FP8_BOTH,
    "fp8, groups": Float("fp8", group_size=128),
    "mxfp8": Float("mxfp8"),
    "mxfp4": Float("mxfp4"),
    "nvfp4": Float("nvfp4"),
    "lookup": Lookup(4, 128),
    "trellis": Trellis(2),
    "sparse": Sparse(6, 8, Dense("bfloat16")),
    "low rank": LowRank(16, Integer(4, 128)),
    "rotated": Rotated(Integer(4, 128)),
}
CARDS = sorted({m.key for name in hardware_names() if (m := find_hardware(name)).kind == "gpu"})
ASKED = [
    "h200",
    "b200",
    "b300",
    "mi300x",
    "mi325x",
    "l4",
    "l40s",
    "a10",
    "rtx-4090",
    "rtx-5090",
    "rtx-pro-6000",
]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_format_has_a_rate_that_its_card_lacks(card: str, name: str) -> None:
    machine, fmt = find_hardware(card), FORMATS[name]
    use = kernel_of(fmt, machine)
    assert use is not None
    assert machine.rate(*use.dtypes) > 0
    rate = compute_rate(fmt, machine)
    assert rate in {1e12 * ops for ops in machine.teraops.values()}
    if fmt not in (W8A8, FP8_BOTH):
        assert rate == dense_rate(machine), "weights alone are of few bits"
    sm = machine.capability
    if rate != dense_rate(machine):
        assert sm is None or (sm >= 89 if fmt is FP8_BOTH else sm < 100)
    if use.name in ("Marlin", "Humming", "CUTLASS"):
        assert sm is not None
        assert sm >= 75
    assert 0 < use.shares.bandwidth <= 1
    assert 0 < use.shares.compute <= 1
    assert use.shares.source


def test_8_bits_go_by_compute_capability() -> None:
    by_card = {
        card: find_hardware(card) for card in ("a100", "a10", "l4", "h200", "b200", "mi300x")
    }
    fp8 = {card: compute_rate(FP8_BOTH, m) / dense_rate(m) for card, m in by_card.items()}
    assert {card for card, times in fp8.items() if times == pytest.approx(2, rel=0.03)} == {
        *("l4", "h200", "b200", "mi300x")
    }
    assert fp8["a100"] == fp8["a10"] == 1
    int8 = {card: compute_rate(W8A8, m) / dense_rate(m) for card, m in by_card.items()}
    assert int8["b200"] == 1, "vLLM's CUTLASS has no int8 there"
    assert all(times == pytest.approx(2, rel=0.03) for c, times in int8.items() if c != "b200")


def test_amd_has_no_marlin() -> None:
    names = {
        name: use.name
        for name, fmt in FORMATS.items()
        if (use := kernel_of(fmt, find_hardware("mi325x"))) is not None
    }
    assert set(names.values()) == {"torch", "triton", "vLLM's in Triton", "vLLM's for ROCm"}
    assert names["int4"] == names["rotated"] == "vLLM's in Triton"
    assert names["int3"] == names["nvfp4"] == "triton"
    assert kernel_of(FORMATS["int4"], find_hardware("l4")).name == "Marlin"  # type: ignore[union-attr]
    assert kernel_of(FORMATS["int3"], find_hardware("l4")).name == "Humming"  # type: ignore[union-attr]


def test_what_no_kernel_reads_has_none() -> None:
    assert kernel_of(TensorTrain(8), find_hardware("h200")) is None


@pytest.mark.parametrize("name", ASKED)
def test_cards_have_sources_and_dates(name: str) -> None:
    machine = find_hardware(name)
    assert machine.capability is not None or str(machine.architecture).startswith("gfx")
    assert ("fp8" in machine.teraops) == (machine.capability not in (75, 80, 86))
    assert ("fp4" in machine.teraops) == ((machine.capability or 0) >= 100)
    assert machine.posted_price is None or "2026-" in machine.posted_by


def test_what_was_measured_replaces_what_was_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    lookup = Lookup(4, 128)
    row = {"kernel": "triton", "stored": lookup.to_dict(), "bits": 4.25}
    rows = [{**row, "faster": {"1": times, "1024": 0.9}} for times in (2.0, 2.5, 3.0)]
    path.write_text(json.dumps({"card": "H200", "architecture": "sm90", "products": rows}))
    monkeypatch.setattr(kernels, "results_path", lambda: path)
    use = kernel_of(Lookup(4, 64), find_hardware("h100"))
    assert use is not None
    assert use.shares.measured
    assert use.shares.bandwidth == pytest.approx(0.8 * 2.5 * 4.25 / 16)
    assert use.shares.compute == pytest.approx(0.5 * 0.9)
    assert "assumed" not in kernel_notes([("lookup", "h100", use)])[0]
    for other in (
        kernel_of(Lookup(3, 64), find_hardware("h100")),
        kernel_of(lookup, find_hardware("l4")),
    ):
        assert other is not None
        assert not other.shares.measured
        assert "arithmetic, assumed, " in kernel_notes([("lookup", "h100", other)])[0]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"card": "H200", "products": []}))
    assert kernels.measured_shares(broken) == {}
    broken = tmp_path / "other.json"
    broken.write_text(json.dumps({"products": 3}))
    with pytest.raises(KernelError, match=r"other\.json: not what"):
        kernels.measured_shares(broken)

"""Which kernel multiplies a format on a GPU, at what rate, and how much of the peaks it reaches.

Which one is what vLLM 0.32 would choose, read in its sources: integers without values between
levels by Marlin or Machete (4 and 8 bits) and Humming (the others), E4M3 and 4-bit floats by Marlin
and with fp8 activations by CUTLASS; all of NVIDIA's from compute capability 7.5 on, none of them on
AMD's, where 4 bits and 8-bit activations have kernels of vLLM's and the rest has ours. What vLLM
knows nothing of is ours everywhere, in Triton. A rate is that of the activations: 16 bits unless
these are of 8, which the card's own units must know (`Hardware.teraops`).

Shares of the peaks are assumptions, with their source, until `tests/benchmarks` was run on a card
of the same architecture: `measured_shares` reads its `gpu.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import FP8, MXFP4, NVFP4, Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.shifted import Shifted
from compress_methods.system.resources import config_path
from compress_methods.system.user_file import read_json_value
from vllm_compress.operations.capacity.hardware import Hardware

SIXTEEN = ("bf16", "fp16", "fp32")
LEAST_CAPABILITY, FP8_CAPABILITY, NO_INT8_CAPABILITY = 75, 89, 100
"""Of Marlin and Humming; of units for fp8; of vLLM's CUTLASS without int8."""
Key = tuple[str, str, tuple[Any, ...]]
OURS = "triton"
"""The name that the table of kernels has for it."""


class KernelError(CompressError):
    """Measurements of a GPU that cannot be read."""


@dataclass(frozen=True)
class Shares:
    """Of the peaks: of bandwidth with one token, of arithmetic with many. `source` says whence."""

    bandwidth: float
    compute: float
    source: str
    measured: bool = False


@dataclass(frozen=True)
class Use:
    """A kernel at work on a card: `dtypes` are those whose rate it has, the first that is there."""

    name: str
    dtypes: tuple[str, ...]
    shares: Shares


PLAIN = Shares(0.8, 0.5, "assumed: usual for products of 16 bits")
HOPPER = "H100, 8192 x 8192, one token: github.com/inclusionAI/humming/pull/2, 2026-03-30"
SMALL = "A10: Marlin, arXiv:2408.11743, reaches 3.87x of 4x; fewer bits assumed"
BY_BITS = {16: 0.8, 8: 0.64, 6: 0.54, 5: 0.49, 4: 0.44, 3: 0.34, 2: 0.26}
"""On cards with HBM: below 8 bits one matrix takes as long as it takes to start and to end."""
BY_BITS_SMALL = {16: 0.8, 8: 0.8, 6: 0.8, 5: 0.8, 4: 0.8, 3: 0.7, 2: 0.6}
HBM = ("sm80", "sm90", "sm100", "sm103", "gfx942")
OF_VLLM, MANY = 0.8, 0.45
"""Ours in Triton: of vLLM's bandwidth, and of arithmetic where it unpacks for torch's product.
Estimates: gemlite's and conch's tables of Triton kernels against Marlin."""


def multiplied(fmt: Format | None) -> Format | None:
    """What a kernel reads of a format: the one inside another basis, or that offsets or a product
    of thin matrices are added to. None where there are values only."""
    base = fmt.base if isinstance(fmt, LowRank | Shifted) else fmt
    return None if base is None else base.inner


def kernel_of(fmt: Format | None, machine: Hardware) -> Use | None:
    """The kernel of a GPU for a format (None: kept); None where there is none."""
    inner = multiplied(fmt)
    if inner is None or isinstance(inner, Dense):
        return Use("torch", SIXTEEN, PLAIN)
    found = _of_vllm(inner, machine)
    if found is None:
        if not isinstance(inner, Integer | Float | Lookup | Trellis | Sparse):
            return None
        found = OURS, SIXTEEN
    name, dtypes = found
    return Use(name, dtypes, _shares(name, inner, machine))


def _of_vllm(inner: Format, machine: Hardware) -> tuple[str, tuple[str, ...]] | None:
    """Name and dtypes of vLLM's kernel, or None."""
    sm = machine.capability
    if isinstance(inner, Integer):
        return _integer(inner, machine, sm)
    if not isinstance(inner, Float) or (sm is not None and sm < LEAST_CAPABILITY):
        return None
    if inner.kind in (MXFP4, NVFP4):
        return None if sm is None else ("Marlin", SIXTEEN)
    if inner.kind != FP8 or (inner.group_rows == 1 and inner.group_size > 0):
        return None
    native = "fp8" in machine.teraops and (sm is None or sm >= FP8_CAPABILITY)
    if inner.activations is not None and native:
        return "CUTLASS" if sm is not None else "vLLM's for ROCm", ("fp8",)
    return None if sm is None else ("Marlin", SIXTEEN)


def _integer(
    inner: Integer, machine: Hardware, sm: int | None
) -> tuple[str, tuple[str, ...]] | None:
    if inner.activations is not None:
        by_row = (inner.bits, inner.group_size, inner.symmetric) == (8, -1, True)
        there = "int8" in machine.teraops and (sm is None or sm < NO_INT8_CAPABILITY)
        name = "CUTLASS" if sm is not None else "vLLM's for ROCm"
        return (name, ("int8",)) if by_row and there else None
    if not inner.holds_zero:
        return None
    if sm is None:
        return ("vLLM's in Triton", SIXTEEN) if inner.bits == 4 else None
    if sm < LEAST_CAPABILITY:
        return None
    marlin = inner.bits == 4 or (inner.bits == 8 and inner.symmetric)
    return ("Marlin" if marlin else "Humming"), SIXTEEN


def kind_of(fmt: Format) -> tuple[Any, ...]:
    """What formats have in common that a kernel is as fast with."""
    values = fmt.values if isinstance(fmt, Sparse) else fmt
    share = fmt.n / fmt.m if isinstance(fmt, Sparse) else 1.0
    kind = getattr(values, "kind", None) if isinstance(values, Float) else None
    return type(values).name, getattr(values, "bits", 16), kind, share


def _shares(name: str, inner: Format, machine: Hardware) -> Shares:
    key = str(machine.architecture), name, kind_of(inner)
    return measured_shares(results_path()).get(key) or _assumed(name, inner, machine)


def _assumed(name: str, inner: Format, machine: Hardware) -> Shares:
    large = machine.architecture in HBM
    values = inner.values if isinstance(inner, Sparse) else inner
    bits = getattr(values, "bits", 16)
    table = BY_BITS if large else BY_BITS_SMALL
    known = table[min((b for b in table if b >= bits), default=16)]
    shares = Shares(known, PLAIN.compute, HOPPER if large else SMALL)
    if name == OURS:
        estimate = f"estimated as {OF_VLLM:.0%} of vLLM's"
        return replace(shares, bandwidth=OF_VLLM * known, compute=MANY, source=estimate)
    return shares


def results_path() -> Path:
    """Where a checkout keeps what was measured of a GPU; a wheel has no such file."""
    return config_path().parent / "tests" / "benchmarks" / "results" / "gpu.json"


@lru_cache
def measured_shares(path: Path) -> Mapping[Key, Shares]:
    """Shares by architecture, kernel and kind of format; none where there is no such file."""
    if not path.exists():
        return {}
    block = read_json_value(path, KernelError)
    found: dict[Key, list[Shares]] = {}
    try:
        source = f"measured against torch on {block['card']}"
        for row in block["products"]:
            key = block["architecture"], row["kernel"], kind_of(format_from_dict(row["stored"]))
            found.setdefault(key, []).append(_against_torch(row, source))
    except (CompressError, KeyError, TypeError, ValueError) as problem:
        raise KernelError(f"{path}: not what tests/benchmarks has of a GPU ({problem})") from None
    return {key: _middle(each) for key, each in found.items()}


def _against_torch(row: Mapping[str, Any], source: str) -> Shares:
    """What a product reached, if torch's with 16 bits reaches what is assumed of it."""
    faster = {int(tokens): float(times) for tokens, times in row["faster"].items()}
    read, done = faster[1] * row["bits"] / 16, faster[max(faster)]
    return Shares(min(1.0, PLAIN.bandwidth * read), min(1.0, PLAIN.compute * done), source, True)


def _middle(found: Sequence[Shares]) -> Shares:
    """The median over matrices."""
    read, done = (sorted(getattr(s, k) for s in found) for k in ("bandwidth", "compute"))
    middle = len(found) // 2
    return replace(found[0], bandwidth=read[middle], compute=done[middle])


def kernel_notes(uses: Sequence[tuple[str, str, Use]]) -> list[str]:
    """What a plan takes of kernels, a line for each source. `uses`: format, machine and kernel;
    torch's is not told."""
    places: dict[tuple[Shares, str], dict[str, None]] = {}
    for fmt, machine, use in uses:
        if use.name != "torch":
            both = f"{use.shares.bandwidth:.0%} and {use.shares.compute:.0%}"
            said = f"{fmt} by {use.name} at {use.dtypes[0]} rate {both}"
            places.setdefault((use.shares, said), {})[machine] = None
    lines: dict[tuple[str, bool], list[str]] = {}
    for (shares, said), machines in places.items():
        lines.setdefault((shares.source, shares.measured), []).append(
            f"{said} ({', '.join(machines)})"
        )
    return [
        f"kernels' shares of bandwidth and arithmetic, {'' if measured else 'assumed, '}{source}: "
        + "; ".join(each)
        for (source, measured), each in lines.items()
    ]

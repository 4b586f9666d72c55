"""The same integers in another format that holds them: more bits, zero points or offsets where
there were none, smaller groups, columns in an order.

vLLM runs neighbours such as q, k and v as one matrix in one format, and cuts columns at groups; so
what each of them is stored as may have to widen. No value changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

from compress_methods.errors import FormatError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.lookup import Lookup, LookupSolution
from compress_methods.formats.wrappers.reordered import Reordered, ReorderedSolution
from compress_methods.formats.wrappers.shifted import Shifted, ShiftedSolution
from compress_methods.lazy import torch

Solution = Any


def recast(fmt: Format, solution: Solution, wanted: Format) -> Solution | None:
    """The solution of `wanted` that has the values of a solution of `fmt`; None where no way is
    known."""
    if fmt == wanted:
        return solution
    if isinstance(wanted, Reordered):
        base, order = (fmt.base, solution.order) if isinstance(fmt, Reordered) else (fmt, None)
        inner = solution.base if isinstance(fmt, Reordered) else solution
        found = recast(base, inner, wanted.base)
        if found is None:
            return None
        return ReorderedSolution(found, torch.arange(_cols(found)) if order is None else order)
    if isinstance(wanted, Shifted):
        return _offsets(fmt, solution, wanted)
    if isinstance(fmt, Integer) and isinstance(wanted, Integer):
        return _integers(fmt, solution, wanted)
    if isinstance(fmt, Lookup) and isinstance(wanted, Lookup):
        return _tables(fmt, solution, wanted)
    return None


def _cols(solution: Solution) -> int:
    return int(solution.codes.shape[1])


def _integers(fmt: Integer, solution: IntegerSolution, wanted: Integer) -> IntegerSolution | None:
    if fmt.bits > wanted.bits or (wanted.symmetric and not fmt.symmetric):
        return None
    if fmt.levels != wanted.levels or fmt.activations != wanted.activations:
        return None
    codes, zeros, cols = solution.codes, solution.zeros, solution.codes.shape[1]
    if wanted.symmetric:
        codes = codes + int(wanted.middle - fmt.middle)
    elif zeros is None:
        zeros = torch.full_like(solution.scales, fmt.middle, dtype=torch.uint8)
    repeat, left = divmod(wanted.groups(cols), fmt.groups(cols))
    if left:
        return None
    scales = solution.scales.repeat_interleave(repeat, 1)
    return IntegerSolution(
        codes, scales, None if zeros is None else zeros.repeat_interleave(repeat, 1)
    )


def _offsets(fmt: Format, solution: Solution, wanted: Shifted) -> ShiftedSolution | None:
    """Codes as they are, with float offsets in place of zero points."""
    if isinstance(fmt, Shifted):
        base, integers, offsets = fmt.codes, solution.base, solution.offsets
    elif isinstance(fmt, Integer) and fmt.activations is None:
        base, integers = fmt, solution
        zeros: Any = fmt.middle if solution.zeros is None else solution.zeros.float()
        offsets = -solution.scales.float() * zeros
    else:
        return None
    cols = _cols(integers)
    repeat, left = divmod(wanted.codes.groups(cols), base.groups(cols))
    if left or base.bits > wanted.codes.bits:
        return None
    scales, offsets = (t.repeat_interleave(repeat, 1) for t in (integers.scales, offsets))
    return ShiftedSolution(IntegerSolution(integers.codes, scales), offsets)


def _tables(fmt: Lookup, solution: LookupSolution, wanted: Lookup) -> LookupSolution | None:
    """The same codes of the same table in smaller groups."""
    cols = _cols(solution)
    if dataclasses.replace(wanted, group_size=fmt.group_size, scale_dtype=fmt.scale_dtype) != fmt:
        return None
    repeat, left = divmod(wanted.groups(cols), fmt.groups(cols))
    if left:
        return None
    return dataclasses.replace(solution, scales=solution.scales.repeat_interleave(repeat, 1))


def common(formats: Iterable[Format]) -> Format | None:
    """The smallest format that holds whatever any of them holds; None where there is none."""
    found = list(dict.fromkeys(formats))
    if len(found) == 1:
        return found[0]
    if any(isinstance(fmt, Shifted) for fmt in found):
        return _with_offsets(found)
    bases = [fmt.base if isinstance(fmt, Reordered) else fmt for fmt in found]
    integers = [base for base in bases if isinstance(base, Integer)]
    if len(integers) < len(bases) or len({base.activations for base in integers}) > 1:
        return None
    dtypes = {base.scale_dtype for base in integers}
    sizes = [base.group_size for base in integers]
    with contextlib.suppress(FormatError):
        wide: Format = dataclasses.replace(
            integers[0],
            bits=max(base.bits for base in integers),
            symmetric=all(base.symmetric for base in integers),
            group_size=min((size for size in sizes if size > 0), default=-1),
            scale_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        )
        return Reordered(wide) if any(isinstance(fmt, Reordered) for fmt in found) else wide
    return None


def _with_offsets(formats: list[Format]) -> Format | None:
    """The same where some have offsets. A float32 scale times a zero point may be none."""
    bases, dtypes = [], set()
    for fmt in formats:
        base = fmt.base if isinstance(fmt, Shifted) else fmt
        if not isinstance(base, Integer) or not base.holds_zero or base.activations is not None:
            return None
        if fmt is base and base.scale_dtype == "float32":
            return None
        bases.append(dataclasses.replace(base, symmetric=True))
        dtypes.add(fmt.offset_dtype if isinstance(fmt, Shifted) else "float32")
    wide = common(bases)
    if wide is None:
        return None
    return Shifted(wide, dtypes.pop() if len(dtypes) == 1 else "float32")


__all__ = ["common", "recast"]

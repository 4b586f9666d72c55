"""Where a block lets factors move: edges found in a `Trace`, each tried before it is believed.

A norm's edge are the matrices whose columns grow together as its channels do. Rows of a matrix and
columns of another one are paired by value: one to one (up and down of a gated MLP, any layer and
the next behind a ReLU, values and output of attention, fused or not), or the columns of several
query heads with the rows of the KV head they share. What has been found is then tried with powers
of two from 1/64 to 64: unless the block's outputs stay, it is no edge.

Not found, on purpose: GELU and sigmoid are no linear functions, so the rows before them have no
edge; neither have matrices that read the residual stream itself (OLMo 2), or a norm that something
else reads besides (post-norm blocks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress_methods.lazy import torch
from compress_methods.transforms.folding.edge import Edge, Gains, Rows, Writer, difference, placed
from compress_methods.transforms.folding.trace import Growth, Trace

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.slot import Slot
    from compress_methods.transforms.base import Part

LOOSE = 0.02
"""How far a share may be from 0 or 1, and a sum from another, before an edge is tried."""
NEAR = 2e-4
"""How far the sums of a row and its column may be apart, as a share of their terms."""
EXACT = {"float32": 1e-4}
ROUNDED = 3e-2
POWERS = 6
PROBES = 16
MOST_SHARING, SMALLEST_HEAD = 256, 8


def find_edges(part: Part, states: Tensor) -> list[Edge]:
    """The edges of a block, in the order its matrices run; `states` [sequences, length, hidden] are
    as many sequences as go through it at once."""
    trace = Trace(part, states)
    with torch.no_grad():
        expected = part.forward(states)
    found: list[Edge] = []
    taken: set[str] = set()

    def keep(candidates: Iterator[Edge]) -> None:
        for edge in candidates:
            read = {slot.module for slot in edge.readers}
            if not read & taken and stays(part, edge, states, expected):
                found.append(edge)
                taken.update(read)

    keep(candidates_of_norms(part, trace))
    keep(candidates_of_rows(part, trace, frozenset(taken)))
    order = {name: i for i, name in enumerate(trace.matrices)}
    last = len(order)
    return sorted(found, key=lambda edge: order.get(edge.readers[0].module, last))


def stays(part: Part, edge: Edge, states: Tensor, expected: Tensor) -> bool:
    """Whether the block's outputs are `expected` after factors that are powers of two."""
    draw = torch.Generator().manual_seed(0)
    powers = torch.randint(-POWERS, POWERS + 1, (edge.writer.channels,), generator=draw)
    factors = (2.0**powers).to(expected.device)
    with placed(part, edge.folded(part, factors)):
        return difference(part, states, expected) < tolerance(expected)


def tolerance(values: Tensor) -> float:
    """What rounding may make of outputs, as a share of what the block adds."""
    return EXACT.get(str(values.dtype).removeprefix("torch."), ROUNDED)


def candidates_of_norms(part: Part, trace: Trace) -> Iterator[Edge]:
    """Norms, each with all that reads it, for gains stored in either way."""
    reads = {name: trace.reads(slot) for name, slot in trace.matrices.items()}
    loose: dict[tuple[str, int], Growth] | None = None
    for name in trace.norms:
        writes = trace.writes(name)
        width = writes.sums.shape[1]
        columns = {other: r for other, r in reads.items() if r.sums.shape[1] == width}
        chosen, others = _readers(writes, columns), dict[str, int]()
        slots = [trace.matrices[other] for other in chosen]
        if not chosen and float(writes.sizes.max()):
            # What no module shows may be what experts and their router read.
            loose = _loose(part, trace) if loose is None else loose
            every: dict[Any, Growth] = {n: r.summed(trace.sequences) for n, r in columns.items()}
            every |= {key: g for key, g in loose.items() if g.sums.shape[1] == width}
            chosen = _readers(writes.summed(trace.sequences), every)
            slots, others = _split(part, trace, chosen)
        channel = torch.arange(width, device=writes.sums.device)
        bias = trace.module(name)._parameters.get("bias") is not None
        if slots:
            for offset in (0.0, 1.0):
                yield Edge(Gains(name, width, offset, bias), tuple(slots), channel, others)


def _loose(part: Part, trace: Trace) -> dict[tuple[str, int], Growth]:
    """How every axis of every parameter that is no module's own matrix grows."""
    found = {}
    for name, gradient in trace.loose().items():
        product = part.tensor(name).double() * gradient
        for axis in range(product.dim()):
            summed = product.movedim(axis, -1).flatten(0, -2)
            found[name, axis] = Growth(summed.sum(0)[None], summed.abs().sum(0))
    return found


def _split(part: Part, trace: Trace, chosen: list[Any]) -> tuple[list[Slot], dict[str, int]]:
    """Slots, those inside loose parameters among them, and the parameters that hold none."""
    slots, others = [], {}
    for key in chosen:
        if isinstance(key, str):
            slots.append(trace.matrices[key])
            continue
        name, axis = key
        inside = [slot for slot in part.slots if slot.parameter == name and slot.index]
        slots += inside
        if not inside:
            others[name] = axis
    return slots, others


def _readers(writes: Growth, columns: Mapping[Any, Growth]) -> list[Any]:
    """The matrices whose columns make up all that is written, if there are such."""
    if not columns or not float(writes.sizes.max()):
        return []
    names = list(columns)
    # Channels differ by orders of magnitude; each counts as much as any other.
    size = writes.sizes + sum(columns[name].sizes for name in names) + 1e-300
    target = (writes.sums / size).flatten().cpu()
    given = torch.stack([(columns[name].sums / size).flatten().cpu() for name in names], 1)
    shares = torch.linalg.lstsq(given, target[:, None], driver="gelsd").solution[:, 0]
    chosen = shares.round().clamp(0, 1)
    if float((shares - chosen).abs().max()) > LOOSE or not chosen.any():
        return []
    left = (given @ chosen - target).norm() / target.norm()
    return [n for n, take in zip(names, chosen, strict=True) if take] if left < LOOSE else []


def candidates_of_rows(part: Part, trace: Trace, taken: frozenset[str]) -> Iterator[Edge]:
    """Pairs of matrices of which one, not `taken`, reads what some rows of the other write."""
    names = list(trace.matrices)
    near = NEAR if tolerance(trace.ends[0]) < ROUNDED else ROUNDED
    writes: dict[str, Growth] = {}
    for place, reader in enumerate(names):
        if reader in taken:
            continue
        columns = trace.reads(trace.matrices[reader])
        for writer in names[:place]:
            if writer not in writes:
                writes[writer] = trace.writes(writer)
            paired = pair(writes[writer], columns, near)
            if paired is None:
                continue
            rows, channel = paired
            bias = trace.module(writer)._parameters.get("bias") is not None
            source: Writer = Rows(trace.matrices[writer], rows, bias)
            yield Edge(source, (trace.matrices[reader],), channel, {})


def pair(rows: Growth, columns: Growth, near: float = NEAR) -> tuple[Tensor, Tensor] | None:
    """Rows [channels] that grow as the columns do, and the channel [cols] of each column.

    Where heads share, the columns of `repeat` heads of `size` add up to the rows of one.
    """
    count = columns.sums.shape[1]
    for repeat, size in _layouts(rows.sums.shape[1], count):
        folded = columns.sums.unflatten(1, (-1, repeat, size)).sum(2).flatten(1)
        sizes = columns.sizes.unflatten(0, (-1, repeat, size)).sum(1).flatten()
        found = _locate(rows, Growth(folded, near * sizes + 1e-300))
        if found is not None:
            channel = torch.arange(len(found), device=found.device).unflatten(0, (-1, size))
            shared = channel[:, None].expand(-1, repeat, -1)
            return found, shared.flatten()
    return None


def _layouts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """How many heads may share and how large they may be: (1, all columns) for one to one."""
    if columns <= rows:
        yield 1, columns
    for repeat in range(2, min(columns, MOST_SHARING) + 1):
        own = columns // repeat
        if columns % repeat == 0 and own <= rows:
            sizes = range(SMALLEST_HEAD, own + 1)
            yield from ((repeat, size) for size in sizes if own % size == 0)


def _locate(rows: Growth, wanted: Growth) -> Tensor | None:
    """The row of every column; `wanted.sizes` is how far a sum may be off.

    Rows lie side by side, or in heads of one size at equal distances (fused query-key-value): some
    columns are searched for, the others have to lie where these say.
    """
    count = wanted.sums.shape[1]
    every = torch.arange(count, device=wanted.sums.device)
    strength = wanted.sums.norm(dim=0) / wanted.sizes
    if _nearest(rows, wanted, strength.argmax()[None]) is None:
        return None
    probes = torch.cat([piece[strength[piece].argmax()][None] for piece in every.chunk(PROBES)])
    places = _nearest(rows, wanted, probes)
    if places is None:
        return None
    shifts = places - probes
    for size in (size for size in range(count, 0, -1) if count % size == 0):
        head, of_probes = every // size, probes // size
        span = int(of_probes[-1] - of_probes[0])
        step = int(shifts[-1] - shifts[0]) // span if span else 0
        found = every + shifts[0] + (head - of_probes[0]) * step
        inside = int(found.min()) >= 0 and int(found.max()) < rows.sums.shape[1]
        if not inside or not torch.equal(found[probes], places) or (step < 0):
            continue
        if bool(((rows.sums[:, found] - wanted.sums).norm(dim=0) <= wanted.sizes).all()):
            return found
    return None


def _nearest(rows: Growth, wanted: Growth, which: Tensor) -> Tensor | None:
    """For some columns the row nearest to each; None as soon as one has none near enough."""
    found = []
    for column in which:
        distance = (rows.sums - wanted.sums[:, column, None]).norm(dim=0)
        best = distance.argmin()
        if distance[best] > wanted.sizes[column]:
            return None
        found.append(best)
    return torch.stack(found)


def unread(part: Part, edges: list[Edge]) -> list[Slot]:
    """The packed matrices of a block whose columns no edge reaches."""
    reached = {slot.module for edge in edges for slot in edge.readers}
    return [s for s in part.slots if s.module not in reached and part.packing(s) is not None]

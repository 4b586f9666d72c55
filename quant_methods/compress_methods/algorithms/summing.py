"""summing: statistics of which several processes have each gathered a share, made those of all.

A process may have seen nothing of a matrix that others have inputs of (an expert that none of its
tokens came to), so all first say what they have. Sums are then added in the order of the matrices,
in place: every process ends with the same bits, as if it had seen all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.algorithms.statistics import Seen, Statistic
from compress_methods.errors import CalibrationError
from compress_methods.lazy import torch
from compress_methods.system.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

Classes = tuple[type[Statistic], ...]


@dataclass(frozen=True)
class _Share:
    """What a process has of one statistic: the first matrix that it is of, the columns of its
    inputs, its tokens, and the shapes of its sums."""

    owner: str
    cols: int
    tokens: int
    shapes: Mapping[str, Sequence[int]]


_Shares = dict[str, dict[type[Statistic], _Share]]


def summed(
    seen: Mapping[str, Seen],
    needs: Mapping[str, Classes],
    device: torch.device,
    processes: Processes,
) -> dict[str, Seen]:
    """Statistics by matrix, of the matrices that ran in any process; `needs` are alike in all."""
    if processes.count == 1:
        return dict(seen)
    told = processes.gathered(_shares(seen, needs))
    made: dict[tuple[str, type[Statistic]], Statistic] = {}
    found: dict[str, Seen] = {}
    for module, classes in needs.items():
        mine: dict[type[Statistic], Statistic] = {}
        for cls in classes:
            shares = [each[module][cls] for each in told if cls in each.get(module, {})]
            if not shares:
                continue
            owner = shares[0].owner
            if any(share.owner != owner for share in shares):
                raise CalibrationError(
                    f"{module}: reads what {owner} reads in some processes only; use one process"
                )
            if (owner, cls) not in made:
                own = seen.get(module, {}).get(cls)
                statistic = cls(shares[0].cols, device) if own is None else own
                made[owner, cls] = _added(statistic, shares, device, processes)
            mine[cls] = made[owner, cls]
        if any(module in each for each in told):
            found[module] = mine
    return found


def _shares(seen: Mapping[str, Seen], needs: Mapping[str, Classes]) -> _Shares:
    owners: dict[int, str] = {}
    found: _Shares = {}
    for module in needs:
        if module not in seen:
            continue
        found[module] = {}
        for cls, statistic in seen[module].items():
            sums = {name: getattr(statistic, name) for name in cls.sums}
            shapes = {name: tuple(t.shape) for name, t in sums.items() if t is not None}
            owner = owners.setdefault(id(statistic), module)
            cols = next(shape[-1] for shape in shapes.values())
            found[module][cls] = _Share(owner, cols, statistic.tokens, shapes)
    return found


def _added(
    statistic: Statistic, shares: Sequence[_Share], device: torch.device, processes: Processes
) -> Statistic:
    """This process's statistic with what all have seen."""
    for name in type(statistic).sums:
        shape = next((share.shapes[name] for share in shares if name in share.shapes), None)
        if shape is None:
            continue
        tensor: Tensor | None = getattr(statistic, name)
        if tensor is None:
            tensor = torch.zeros(*shape, device=device)
        processes.add(tensor)
        setattr(statistic, name, tensor)
    statistic.tokens = sum(share.tokens for share in shares)
    return statistic

"""comparing: a block of the result beside the original's, on the same text.

Statistics that compare (`algorithms.statistics.Comparison`) need the inputs of a matrix in both
models. The block as it was before packing is kept, runs on the original's states, and right after
it the block as it is now on the result's: batch by batch, so that no more than a batch of inputs is
in memory. The output head has no block: there both models' last states go through the last norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_methods.algorithms import Seen, Statistic
from compress_methods.algorithms.statistics import Comparison, RowGroups
from compress_methods.algorithms.summing import summed
from compress_methods.conversion.part import BlockPart
from compress_methods.conversion.planning.plan import HEAD_BLOCK
from compress_methods.model.stream import Watched, find_places, watch

Needs = Mapping[str, tuple[type[Statistic], ...]]


class Comparer:
    """Gathers statistics of a part beside the part as it was when this was made, of which only the
    matrices `changing` are there twice; of modules with `weights` [tokens, groups] in groups of
    rows."""

    def __init__(
        self,
        part: BlockPart,
        changing: Iterable[str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.part, self.weights = part, weights or {}
        self.is_head = part.index == HEAD_BLOCK
        self.original = part.module if self.is_head else _beside(part, changing)
        self.places: dict[str, str] = {}

    @torch.no_grad()
    def look(self, modules: Sequence[str]) -> list[list[str]]:
        """Find where `modules` add to the stream; returns them by statistics they share, in the
        order they run in."""
        if self.is_head:
            return [list(modules)]
        names = [self._short(module) for module in modules]
        states = self.part.inputs()
        block = self.part.module
        batches = states.split(self.part.runner.batch)  # blocks may know how many come together
        self.places = find_places(block, names, batches[0], self._run(block, batches[0]))
        groups: list[list[str]] = []
        missing = set(names)
        for piece in batches:
            seen = watch(block, names, {}, self._run(block, piece))
            groups += _by_input({n: x for n, x in seen.inputs.items() if n in missing})
            missing -= seen.inputs.keys()
            if not missing:  # an expert may have to wait for its first token
                break
        groups = self._agreed(groups)
        found = [[f"{self.part.prefix}.{name}" for name in names] for names in groups]
        return [names for group in found for names in self._shared(group)]

    def _agreed(self, groups: Sequence[Sequence[str]]) -> list[list[str]]:
        """What each of several processes has found, those of the first one first."""
        told = self.part.processes.gathered((groups, self.places))
        self.places = {n: place for _, places in reversed(told) for n, place in places.items()}
        found: list[list[str]] = []
        known: set[str] = set()
        for each, _ in told:
            new = [[name for name in names if name not in known] for names in each]
            found += [names for names in new if names]
            known = {name for names in found for name in names}
        return found

    def _shared(self, modules: Sequence[str]) -> list[list[str]]:
        """Those that read one input, apart where each weights it in its own way."""
        alone = [[name] for name in modules if name in self.weights]
        rest = [name for name in modules if name not in self.weights]
        return [rest, *alone] if rest else alone

    @torch.no_grad()
    def statistics(self, needs: Needs) -> dict[str, Seen]:
        """Statistics of modules that share one input, by module. One that sees other tokens than
        the original's (an expert behind a router) is not compared."""
        names = [self._short(module) for module in needs]
        places = {name: place for name, place in self.places.items() if names == [name]}
        made: dict[type[Statistic], Statistic] = {}
        classes = {cls for asked in needs.values() for cls in asked}
        batch = self.part.runner.batch
        before = self.part.before()
        assert before is not None
        for old, now in zip(before.split(batch), self.part.inputs().split(batch), strict=True):
            there = self._watch(self.original, old, names, places)
            here = self._watch(self.part.module, now, names, places)
            if names[0] not in here.inputs:
                continue
            x = _rows(here.inputs[names[0]])
            for cls in sorted(classes, key=lambda cls: cls.__name__):
                if cls not in made:
                    made[cls] = self._make(cls, next(iter(needs)), x)
                statistic = made[cls]
                if issubclass(cls, Comparison):
                    if len(x) == len(now.flatten(0, 1)):
                        _compare(statistic, names[0], there, here)
                else:
                    statistic.add_batch(x)
                    statistic.tokens += len(x)
        made = {cls: s for cls, s in made.items() if s.tokens}
        seen = {n: {cls: made[cls] for cls in asked if cls in made} for n, asked in needs.items()}
        return summed(seen, needs, self.part.device, self.part.processes)

    def _make(self, cls: type[Statistic], module: str, x: Tensor) -> Statistic:
        if module in self.weights:
            return RowGroups(cls, self.weights[module], x.shape[1], x.device)
        return cls(x.shape[1], x.device)

    def _watch(
        self, block: nn.Module, states: Tensor, names: Sequence[str], places: Mapping[str, str]
    ) -> Watched:
        if self.is_head:
            seen = Watched()
            self.part.runner.watch_head(
                states, lambda name, module, args: seen.inputs.update({names[0]: args[0]})
            )
            return seen
        return watch(block, names, places, self._run(block, states))

    def _run(self, block: nn.Module, states: Tensor) -> Callable[[], Tensor]:
        index = self.part.index
        assert index is not None
        return lambda: self.part.runner.forward(index, states, block)

    def _short(self, module: str) -> str:
        return module.removeprefix(f"{self.part.prefix}.")


def _beside(part: BlockPart, changing: Iterable[str]) -> nn.Module:
    """A copy of a block that has the same tensors but for the matrices `changing`."""
    own = {part.skeleton.slots[module].parameter for module in changing}
    named = part.module.named_parameters()
    shared = {id(p): p for name, p in named if f"{part.prefix}.{name}" not in own}
    return copy.deepcopy(part.module, shared)


def _by_input(inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by the tensor they share."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in inputs.items():
        known = next((names for x, names in groups if x is tensor), None)
        if known is None:
            groups.append((tensor, [name]))
        else:
            known.append(name)
    return [names for _, names in groups]


def _compare(statistic: Statistic, name: str, there: Watched, here: Watched) -> None:
    """Add both models' inputs of a module, where both have seen the same tokens."""
    if name not in there.inputs:
        return
    original, x = _rows(there.inputs[name]), _rows(here.inputs[name])
    if len(original) != len(x):
        return
    gap = None
    if name in here.beside:
        gap = _rows(there.beside[name]) - _rows(here.beside[name])
    assert isinstance(statistic, Comparison)
    statistic.add_pair(original, x, gap)
    statistic.tokens += len(x)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()

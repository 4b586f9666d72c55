"""What algorithms learn of a layer's inputs while calibration text runs through it.

A statistic is a class with `add_batch`. An algorithm names the classes it needs; the pipeline makes
one of each for every distinct input, so q, k and v share theirs. Another one is another class, in
any distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import CalibrationError
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.formats import Format


class Statistic(ABC):
    """Gathered over all calibration tokens of one input of `cols` columns, on `device`."""

    correlates: ClassVar[bool] = False
    """Whether `moved` knows how columns go together."""
    sums: ClassVar[tuple[str, ...]] = ()
    """Attributes that are sums over tokens, tensors or None, until `result` is first called: what
    several processes add up. Without any, one process has to see all the text."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.tokens = 0
        self.effective = 1.0
        """How many tokens that count the same would tell as much, as a share of `tokens`."""

    @abstractmethod
    def add_batch(self, x: Tensor) -> None:
        """x [tokens, cols] float32: more of the layer's input."""

    @classmethod
    def of(cls, seen: Seen) -> Tensor:
        """What this class's instance among `seen` amounts to, as a tensor."""
        return seen[cls].result()

    @abstractmethod
    def result(self) -> Tensor:
        """What was gathered, as a tensor; gathering ends with the first call."""

    def moved(self, matrix: Tensor) -> Tensor | None:
        """matrix @ E[x x^T] as far as this statistic knows it, for errors of outputs; else None."""
        return None

    def turned(self, fmt: Format) -> Statistic:
        """The same of inputs (and outputs) in the basis of `fmt.inner`; this one stays as it is.
        `CalibrationError` where what was gathered does not tell."""
        raise CalibrationError(
            f"{type(self).__name__} does not tell how columns go together, which a rotated format "
            "needs; choose an algorithm that gathers a Hessian, such as gptq, or rtn"
        )


class Comparison(Statistic):
    """What compares the original's inputs with the result's. Where there is no original to compare
    with, it is not among what was seen."""

    def add_batch(self, x: Tensor) -> None:
        """Nothing: one model's inputs alone say nothing."""

    @abstractmethod
    def add_pair(self, original: Tensor, x: Tensor, gap: Tensor | None) -> None:
        """Both models' inputs [tokens, cols] for the same tokens, float32.

        `gap` [tokens, rows]: the original's residual stream, as the layer's output is about to be
        added to it, less the result's; None where the layer adds to none.
        """


def compares(classes: Iterable[type[Statistic]]) -> bool:
    """Whether any of the statistics takes the original's inputs, too."""
    return any(issubclass(cls, Comparison) for cls in classes)


Seen = Mapping[type[Statistic], Statistic]
"""The statistics of one input."""


class InputNorms(Statistic):
    """Sum of squares of each input column over all tokens: `squares` [cols] float32."""

    sums: ClassVar[tuple[str, ...]] = ("squares",)

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self.squares = torch.zeros(cols, device=device)

    def add_batch(self, x: Tensor) -> None:
        self.squares += x.square().sum(0)

    def result(self) -> Tensor:
        return self.squares

    def moved(self, matrix: Tensor) -> Tensor:
        """As if columns had no correlations."""
        return matrix * self.squares


class Hessian(Statistic):
    """Mean of x x^T: [cols, cols] float32, half the second derivative of the layer's mean squared
    output error by any row of its weight."""

    correlates: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]] = ("_sum",)

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._sum = torch.zeros(cols, cols, device=device)
        self._divided = False

    def add_batch(self, x: Tensor) -> None:
        self._sum.addmm_(x.T, x)

    def result(self) -> Tensor:
        """The mean; the sum is divided in place."""
        if not self._divided:
            self._sum /= max(1, self.tokens)
            self._divided = True
        return self._sum

    def moved(self, matrix: Tensor) -> Tensor:
        return matrix @ self.result()

    def turned(self, fmt: Format) -> Hessian:
        mean = self.result()
        out = copy(self)
        out._sum = _both_ends(mean, fmt)
        return out


@dataclass(frozen=True)
class Missing:
    """Mean of (W x + r - W x~ - r~) x~^T [rows, cols] of a matrix W, see `Drift`, and of how many
    tokens."""

    products: Tensor
    tokens: float


class Drift(Comparison):
    """How far the result's inputs x~ have come from the original's x: mean of (x - x~) x~^T
    [cols, cols] and, of layers that add to the residual stream r, mean of (r - r~) x~^T
    [rows, cols], both float32."""

    sums: ClassVar[tuple[str, ...]] = ("_inputs", "_stream")

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._inputs = torch.zeros(cols, cols, device=device)
        self._stream: Tensor | None = None
        self._divided = False

    def add_pair(self, original: Tensor, x: Tensor, gap: Tensor | None) -> None:
        self._inputs.addmm_((original - x).T, x)
        if gap is not None:
            if self._stream is None:
                self._stream = gap.new_zeros(gap.shape[1], x.shape[1])
            self._stream.addmm_(gap.T, x)

    def result(self) -> Tensor:
        """What is missing at the inputs; the sums are divided in place."""
        if not self._divided:
            self._inputs /= max(1, self.tokens)
            if self._stream is not None:
                self._stream /= max(1, self.tokens)
            self._divided = True
        return self._inputs

    def missing(self, weight: Tensor) -> Missing:
        """What `weight` [rows, cols] has to make up for."""
        found = weight @ self.result()
        if self._stream is not None:
            found.add_(self._stream)
        return Missing(found, self.tokens * self.effective)

    def turned(self, fmt: Format) -> Drift:
        mean = self.result()
        out = copy(self)
        out._inputs = _both_ends(mean, fmt)
        out._stream = None if self._stream is None else fmt.turn(self._stream)
        return out


def _both_ends(moments: Tensor, fmt: Format) -> Tensor:
    """T M T^T of mean products of inputs, T being what `fmt` does to them."""
    return fmt.turn_inputs(fmt.turn_inputs(moments).T).T.contiguous()


class RowGroups(Comparison):
    """One `cls` for each group of neighbouring rows of a matrix, all groups of the same size.

    In the one of a group tokens count by `weights` [tokens, groups], whose means are 1: what is
    gathered are products of inputs, so inputs are scaled by the roots. Batches must come in the
    order of the weights, every token once.
    """

    correlates: ClassVar[bool] = True

    def __init__(
        self, cls: type[Statistic], weights: Tensor, cols: int, device: torch.device
    ) -> None:
        super().__init__(cols, device)
        self.roots = weights.sqrt().to(device)
        self.parts = [cls(cols, device) for _ in range(weights.shape[1])]
        # Kish's effective sample size.
        shares = weights.mean(0).square() / weights.square().mean(0)
        for part, share in zip(self.parts, shares.tolist(), strict=True):
            part.effective = share

    def _fed(self, count: int) -> Iterator[tuple[Statistic, Tensor]]:
        """The statistic of each group, and the roots [count, 1] that the next tokens have in it."""
        roots = self.roots[self.tokens : self.tokens + count]
        if len(roots) < count:
            raise CalibrationError(f"{len(self.roots)} tokens have weights, but more came")
        for part, root in zip(self.parts, roots.split(1, dim=1), strict=True):
            part.tokens += count
            yield part, root

    def add_batch(self, x: Tensor) -> None:
        for part, root in self._fed(len(x)):
            part.add_batch(x * root)

    def add_pair(self, original: Tensor, x: Tensor, gap: Tensor | None) -> None:
        """As `Comparison.add_pair`; each group gets its own rows of the gap."""
        count = len(self.parts)
        gaps = [None] * count if gap is None else list(gap.chunk(count, dim=1))
        for (part, root), mine in zip(self._fed(len(x)), gaps, strict=True):
            assert isinstance(part, Comparison)
            part.add_pair(original * root, x * root, None if mine is None else mine * root)

    def result(self) -> Tensor:
        """What each group's amounts to, along a first axis."""
        return torch.stack([part.result() for part in self.parts])

    def moved(self, matrix: Tensor) -> Tensor | None:
        pieces = matrix.chunk(len(self.parts))
        found = [part.moved(rows) for part, rows in zip(self.parts, pieces, strict=True)]
        known = [moved for moved in found if moved is not None]
        return torch.cat(known) if len(known) == len(found) else None


def by_rows(seen: Seen) -> list[Seen]:
    """What was seen for each group of neighbouring rows; one for all where they share it."""
    grouped = [s for s in seen.values() if isinstance(s, RowGroups)]
    if not grouped:
        return [dict(seen)]
    every = zip(*(statistic.parts for statistic in grouped), strict=True)
    return [dict(zip(seen, parts, strict=True)) for parts in every]


def let_go_of_comparisons(seen: Seen) -> None:
    """Forget what is as large as a Hessian, and of no use once `Algorithm.missing` has it."""
    if isinstance(seen, dict):
        for cls in [cls for cls in seen if issubclass(cls, Comparison)]:
            del seen[cls]


class TurnedSeen(Mapping[type[Statistic], Statistic]):
    """Statistics of one input in the basis of `fmt.inner`, each turned when it is asked for."""

    def __init__(self, seen: Seen, fmt: Format) -> None:
        self._seen, self._fmt = seen, fmt

    def __getitem__(self, cls: type[Statistic]) -> Statistic:
        return self._seen[cls].turned(self._fmt)

    def __contains__(self, cls: object) -> bool:
        return cls in self._seen

    def __iter__(self) -> Iterator[type[Statistic]]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)


class Gatherer:
    """Feeds statistics from hooks: for each module the classes it needs, one instance per distinct
    input. `seen` holds what was gathered, by module, of those that ran. Modules with `weights`
    [tokens, groups] get their own, in groups of rows."""

    def __init__(
        self,
        needs: Mapping[str, tuple[type[Statistic], ...]],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights = weights or {}
        alone = {
            name: tuple(cls for cls in classes if not issubclass(cls, Comparison))
            for name, classes in needs.items()
        }
        self.needs = {name: classes for name, classes in alone.items() if classes}
        self.seen: dict[str, Seen] = {}
        # Inputs of the first batch, with the first module that read each: it feeds the others'.
        self._inputs: list[tuple[Any, str, dict[type[Statistic], Statistic]]] = []
        self._feeds: dict[str, list[Statistic]] = {}

    def hook(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the module `name`."""
        if name not in self.seen:
            self._enter(name, args[0])
        feeds = self._feeds.get(name)
        if feeds:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            for statistic in feeds:
                statistic.add_batch(x)
                statistic.tokens += len(x)

    def _enter(self, name: str, x: Tensor) -> None:
        """Share what another module gathers of the same tensor, and gather the rest."""
        if name in self.weights:
            make = partial(RowGroups, weights=self.weights[name], cols=x.shape[-1], device=x.device)
            self.seen[name] = {cls: make(cls) for cls in self.needs[name]}
            self._feeds[name] = list(self.seen[name].values())
            return
        found = next((entry for entry in self._inputs if entry[0] is x), None)
        if found is None:
            found = (x, name, {})
            self._inputs.append(found)
        known = found[2]
        for cls in self.needs[name]:
            if cls not in known:
                known[cls] = cls(x.shape[-1], x.device)
                self._feeds.setdefault(name, []).append(known[cls])
        self.seen[name] = {cls: known[cls] for cls in self.needs[name]}


def relative_error(weight: Tensor, values: Tensor, seen: Seen | None = None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration tokens; without them ||W - Q||^2 / ||W||^2.

    Of several statistics one that knows correlations counts; input norms alone stand for inputs
    without.
    """
    known = sorted((seen or {}).values(), key=lambda statistic: not statistic.correlates)

    def energy(matrix: Tensor) -> float:
        found = (statistic.moved(matrix) for statistic in known)
        moved = next((m for m in found if m is not None), matrix)
        return float(torch.linalg.vecdot(moved, matrix).sum(dtype=torch.float64))

    return energy(weight - values) / max(energy(weight), 1e-30)

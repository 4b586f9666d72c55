"""What an algorithm is: it names what calibration has to show, prepares, solves.

`needs` names the statistics to gather; `prepare` turns them into whatever all matrices reading the
same input can share (q, k and v share one Hessian); `aim` says what a matrix should be close to;
`solve` chooses its values. An algorithm is a frozen dataclass whose fields are its parameters in a
recipe. It asks the format for everything the format decides (`grid`, `rounder`, `select`) and never
what kind of format it is. Who has a matrix filled calls `ready`, `target_of` and `fill`, which know
formats that store a matrix in another basis: the algorithm is given the problem as it is there, and
the format inside.

A new algorithm is one file with a class under `@register_algorithm`, or the same in another
distribution through the entry-point group `vllm_compress.algorithms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.statistics import Seen, Statistic, TurnedSeen
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Refinement:
    """How the solved matrices of a block are trained together, see `refine.py`. `left_out`: share
    of a batch's errors that do not count; None for what few bits call for."""

    iterations: int
    batch: int
    rate: float
    left_out: float | None
    precision: str

    def rate_at(self, iteration: int) -> float:
        """Step of an iteration, in units of what moves."""
        return self.rate * (1 - 0.9 * iteration / self.iterations)


@dataclass(frozen=True)
class Algorithm(ABC):
    """A way to choose the stored values of a matrix."""

    name: ClassVar[str]
    blocks_only: ClassVar[bool] = False
    """Whether it needs a decoder block around a matrix."""
    row_independent: ClassVar[bool] = True
    """Whether rows of a matrix may be solved in several calls (large ones are, to save memory)."""
    copies: ClassVar[bool] = False
    """Whether it takes what the source stores instead of solving."""

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        """Statistics of the layer's input that filling `fmt` takes; a wrapper adds its own to those
        of what it wraps."""
        return ()

    @property
    def refinement(self) -> Refinement | None:
        """How the matrices of a block are trained together once each is solved; None: not."""
        return None

    @property
    def loss_groups(self) -> int:
        """Groups of rows of a matrix that each get their own statistics, in which tokens count by
        what they do to the loss; 0: all rows share those in which every token counts the same."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The mapping that a recipe gives it by."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        nested = {k: v.to_dict() if isinstance(v, Algorithm) else v for k, v in values.items()}
        return {"algorithm": self.name, **nested}

    def check_format(self, fmt: Format) -> None:  # noqa: B027
        """Raise `RecipeError` when this algorithm cannot fill that format."""

    def prepare(self, seen: Seen, fmt: Format) -> Any:
        """Work that all matrices of one format with the same input share."""
        return seen

    def missing(self, weight: Tensor, seen: Seen, fmt: Format) -> Any:
        """What `aim` takes of statistics that compare, which nothing else needs: they are large and
        gone when `prepare` is called."""
        return None

    def aim(self, weight: Tensor, prepared: Any, missing: Any) -> Tensor:
        """What `solve` is to come close to instead of `weight` [rows, cols], for all rows."""
        return weight

    @abstractmethod
    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        """Solution of `fmt` for `weight` [rows, cols] float32."""

    def ready(self, seen: Seen, fmt: Format) -> Any:
        """`prepare` for any format; `CalibrationError` for a statistic that cannot be had in the
        basis of one inside another."""
        return self.prepare(_inside(seen, fmt), fmt.inner)

    def missed_by(self, weight: Tensor, seen: Seen, fmt: Format) -> Any:
        """`missing` for any format."""
        return self.missing(fmt.turn(weight), _inside(seen, fmt), fmt.inner)

    def target_of(self, weight: Tensor, prepared: Any, missing: Any, fmt: Format) -> Tensor:
        """`aim` for any format, with what `ready` prepared for it and `missed_by` found; in the
        basis of `weight`."""
        if fmt.inner is fmt:
            return self.aim(weight, prepared, missing)
        return fmt.turn_back(self.aim(fmt.turn(weight), prepared, missing))

    def fill(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        """`solve` for any format, with what `ready` prepared for it."""
        return self.solve(fmt.turn(weight), prepared, fmt.inner)


def _inside(seen: Seen, fmt: Format) -> Seen:
    """Statistics in the basis that a format stores its matrix in."""
    return seen if fmt.inner is fmt else TurnedSeen(seen, fmt)


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "vllm_compress.algorithms")
register_algorithm = ALGORITHMS.register


def nested(spec: str | dict | Algorithm, where: str) -> Algorithm:
    """The algorithm that a field holds: a name, a mapping with its parameters, or itself."""
    if isinstance(spec, Algorithm):
        return spec
    values = {"algorithm": spec} if isinstance(spec, str) else spec
    found: Algorithm = ALGORITHMS.build(values, "algorithm", where, RecipeError)
    if found.refinement is not None:
        raise RecipeError(f"{where} is {found.name!r}, which refines already; expected another")
    return found


def require(condition: bool, algorithm: str, fmt: Format, expected: str) -> None:
    """`RecipeError` naming algorithm and format unless `condition`."""
    if not condition:
        raise RecipeError(f"algorithm {algorithm!r} cannot fill format {fmt.name!r}: {expected}")

"""refine: learned rounding. All matrices of a block trained together, by the block's output.

With B the original's block and h its input there, B_q the packed block and h_q the input that the
packed blocks before it give, and weights w = s a (c - z) with codes c, scales s, factors a,

    min over c, a, z of  mean over tokens of ||B_q(h_q) - B(h)||^2 / ||B(h)||^2

the aim of SignRound (Cheng et al., 2023, arXiv:2309.05516; version 2: 2025, arXiv:2512.04746). The
way is that of progressive rounding (TesseraQ: Li & Panda, 2024, arXiv:2410.19103): codes start
where the weights are, between whole ones, and move by gradients; more and more of them settle on
the whole code they are nearest to, and those still free make up for what that changes. After a
share x of `SETTLED` of the iterations 1 - (1 - x)^2 have settled; the rest of the iterations moves
what is never whole, such as scales. (Signed gradients through the rounding, SignRound's way, first
undid what GPTQ had achieved when we tried them on one matrix with correlated inputs.)

Steps are momentum over the root mean square of the gradient's group (Adam-mini: Zhang et al., 2024,
arXiv:2406.16793), times `rate` falling linearly to a tenth. `start` gives scales and zeros, and
where codes start what it aims at; since h_q differs from h, errors of earlier blocks are corrected.
Errors are relative to a token's own output, so that the few tokens with massive activations do not
count for all others; below 4 bits the largest of a batch are left out. Kept is what has the least
loss on some sequences of the text, the start among it: on those it is never worse.

Needs calibration text (with little of it the block fits the text instead of the model), a format
that `relaxes`, and iterations: what settles in a few dozen is worse than what GPTQ has found, and
then the start stays. Memory: see `conversion/passes/refining.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import (
    Algorithm,
    Refinement,
    nested,
    register_algorithm,
    require,
)
from compress_methods.algorithms.statistics import InputNorms, Seen, Statistic
from compress_methods.errors import RecipeError
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

SETTLED = 0.9
PRECISIONS = ("float32", "bfloat16")


@register_algorithm
@dataclass(frozen=True)
class Refine(Algorithm):
    """`start`: the algorithm that solves each matrix first, a name or a mapping with its
    parameters; the others as `Refinement` has them."""

    start: str | dict | Algorithm = "gptq"
    iterations: int = 200
    batch: int = 2
    rate: float = 0.1
    left_out: float | None = None
    precision: str = "float32"
    name: ClassVar[str] = "refine"
    blocks_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", nested(self.start, "start"))
        for key, value in (("iterations", self.iterations), ("batch", self.batch)):
            if value < 1:
                raise RecipeError(f"{key} is {value}, expected at least 1")
        if self.rate <= 0:
            raise RecipeError(f"rate is {self.rate}, expected more than 0")
        if self.left_out is not None and not 0 <= self.left_out < 1:
            raise RecipeError(f"left_out is {self.left_out}, expected a share in [0, 1)")
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"precision is {self.precision!r}, expected {' or '.join(PRECISIONS)}"
            )

    @property
    def first(self) -> Algorithm:
        """The algorithm that solves each matrix before the block is trained."""
        assert isinstance(self.start, Algorithm)
        return self.start

    @property
    def refinement(self) -> Refinement:
        return Refinement(self.iterations, self.batch, self.rate, self.left_out, self.precision)

    @property
    def loss_groups(self) -> int:
        return self.first.loss_groups

    @property
    def row_independent(self) -> bool:  # type: ignore[override]
        return self.first.row_independent

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        """Something always: text has to run through the block."""
        return self.first.needs(fmt) or (InputNorms,)

    def check_format(self, fmt: Format) -> None:
        require(fmt.relaxes, "refine", fmt, "it needs one that gradients can move")
        self.first.check_format(fmt)

    def prepare(self, seen: Seen, fmt: Format) -> Any:
        return self.first.prepare(seen, fmt)

    def missing(self, weight: Tensor, seen: Seen, fmt: Format) -> Any:
        return self.first.missing(weight, seen, fmt)

    def aim(self, weight: Tensor, prepared: Any, missing: Any) -> Tensor:
        return self.first.aim(weight, prepared, missing)

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        return self.first.solve(weight, prepared, fmt)

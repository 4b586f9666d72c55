"""svd: fill the base by another algorithm, then add the A B that makes up for most of what it lost.

With H = mean of x x^T and E = W - Q the error of the base's values Q, A B is the matrix of rank r
that leaves the least tr((E - A B) H (E - A B)^T): the SVD of E whitened by H (SVD-LLM, Wang et al.,
2024, arXiv:2403.07378; exact correction as in QERA, Zhang et al., 2025, arXiv:2410.06040, and EoRA,
Liu et al., 2024, arXiv:2410.21271), see `formats/fitting/principal.py`. `rounds` above 1 alternate
(CALDERA, Saha et al., 2024, arXiv:2405.18886): the base is filled again with what A B leaves to it;
the round of the least error is kept. H is damped, so that directions that calibration hardly saw
count.

Fills format `lowrank`; of one without a base, A B is fitted to the weights. Other formats are
filled by `base` alone, so that a list of formats may hold both. What matrices aim at is what `base`
has them aim at: with `gptq` the original's outputs.

Needs calibration tokens, ideally several times the columns. Each round takes as long as `base`.
Fails where errors have no direction: what rounding to 4 bits and more loses is nearly white, and
finer scales win more for the same bytes; low rank is for few bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import Algorithm, nested, register_algorithm
from compress_methods.algorithms.statistics import Hessian, Seen, Statistic
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.formats.wrappers.lowrank import LowRank, LowRankSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROUNDS = 100


@dataclass(frozen=True)
class Prepared:
    """What `base` prepared for `format`, and H damped, None where it only fills the base's."""

    base: Any
    format: Format
    hessian: Tensor | None


@register_algorithm
@dataclass(frozen=True)
class SVD(Algorithm):
    """`base`: the algorithm that fills the base format, a name or a mapping with its parameters;
    `rounds`: how often base and A B are fitted; `damping`: fraction of mean(diag H) added to it."""

    base: str | dict | Algorithm = "gptq"
    rounds: int = 1
    damping: float = 0.01
    name: ClassVar[str] = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", nested(self.base, "base"))
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise RecipeError(f"rounds is {self.rounds}, expected a number up to {MOST_ROUNDS}")
        if not 0 < self.damping <= 1:
            raise RecipeError(f"damping is {self.damping}, expected a number in (0, 1]")

    @property
    def first(self) -> Algorithm:
        """The algorithm that fills the base."""
        assert isinstance(self.base, Algorithm)
        return self.base

    @property
    def blocks_only(self) -> bool:  # type: ignore[override]
        return self.first.blocks_only

    @property
    def row_independent(self) -> bool:  # type: ignore[override]
        return self.first.row_independent

    @property
    def loss_groups(self) -> int:
        return self.first.loss_groups

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        found = self.first.needs(_filled(fmt))
        return found if Hessian in found or not isinstance(fmt, LowRank) else (*found, Hessian)

    def check_format(self, fmt: Format) -> None:
        if not (isinstance(fmt, LowRank) and fmt.base is None):
            self.first.check_format(_filled(fmt))

    def prepare(self, seen: Seen, fmt: Format) -> Prepared:
        base = self.first.ready(seen, _filled(fmt))
        if not isinstance(fmt, LowRank):
            return Prepared(base, fmt, None)
        damped = Hessian.of(seen).clone()
        damped.diagonal().add_(self.damping * (float(damped.diagonal().mean()) or 1.0))
        return Prepared(base, fmt, damped)

    def missing(self, weight: Tensor, seen: Seen, fmt: Format) -> Any:
        return self.first.missed_by(weight, seen, _filled(fmt))

    def aim(self, weight: Tensor, prepared: Prepared, missing: Any) -> Tensor:
        return self.first.target_of(weight, prepared.base, missing, _filled(prepared.format))

    def solve(self, weight: Tensor, prepared: Prepared, fmt: Format) -> Any:
        if not isinstance(fmt, LowRank):
            return self.first.fill(weight, prepared.base, fmt)
        hessian = prepared.hessian
        assert hessian is not None
        if fmt.base is None:
            return fmt.correct(None, weight, hessian)
        best: LowRankSolution | None = None
        least, left = float("inf"), weight
        for _ in range(self.rounds):
            base = self.first.fill(left, prepared.base, fmt.base)
            found = fmt.correct(base, weight - fmt.base.matrix(base), hessian)
            error = weight - fmt.matrix(found)
            lost = float(torch.linalg.vecdot(error @ hessian, error).sum(dtype=torch.float64))
            if best is None or lost < least:
                best, least = found, lost
            left = weight - fmt.product(found)
        return best


def _filled(fmt: Format) -> Format:
    """The format that `base` fills, or this one where there is none."""
    return fmt.base if isinstance(fmt, LowRank) and fmt.base is not None else fmt

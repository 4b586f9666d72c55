"""kmeans: tables of the values that weights cluster at, weighted by how much each weight matters.

SqueezeLLM (Kim et al., 2023, arXiv:2306.07629): the table T and the codes c of a row minimize

  sum_j h_j (w_j - T[c_j])^2

h_j there being a weight's squared gradient, here the diagonal of H = mean of x x^T, the squared
size of its input: all weights of a column count alike. `formats/fitting/table_search.py` says how
tables and scales are fitted. Every value is then the nearest one.

Needs the norms of the inputs alone, and a format with learned tables. No weight makes up for
another's error: `gptq` starts from the same tables and loses less. The paper's sparse matrix of
outliers is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import Algorithm, register_algorithm, require
from compress_methods.algorithms.statistics import Hessian, InputNorms, Seen, Statistic
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor


@register_algorithm
@dataclass(frozen=True)
class KMeans(Algorithm):
    """No parameters."""

    name: ClassVar[str] = "kmeans"

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        return (InputNorms,) if fmt.inner is fmt else (Hessian,)  # norms cannot be turned

    def check_format(self, fmt: Format) -> None:
        require(fmt.learns_values, "kmeans", fmt, "it needs learned values, such as lookup's")

    def prepare(self, seen: Seen, fmt: Format) -> Tensor:
        return InputNorms.of(seen) if InputNorms in seen else Hessian.of(seen).diagonal()

    def solve(self, weight: Tensor, prepared: Tensor, fmt: Format) -> Any:
        return fmt.nearest(weight, prepared)

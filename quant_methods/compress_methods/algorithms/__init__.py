"""How stored values are chosen: one file per paper. Needs no torch until a matrix is solved."""

from compress_methods.algorithms import (  # noqa: F401  (registers them)
    gptq,
    kmeans,
    refine,
    repack,
    rtn,
    svd,
)
from compress_methods.algorithms.base import ALGORITHMS, Algorithm, register_algorithm
from compress_methods.algorithms.pruning import alps, magnitude, sparsegpt, wanda  # noqa: F401
from compress_methods.algorithms.statistics import Hessian, InputNorms, Seen, Statistic

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Hessian",
    "InputNorms",
    "Seen",
    "Statistic",
    "register_algorithm",
]

"""How stored values are chosen: one file per paper."""

from compress_methods.algorithms import (  # noqa: F401  (registers them)
    alps,
    gptq,
    magnitude,
    rtn,
    sparsegpt,
    wanda,
)
from compress_methods.algorithms.base import ALGORITHMS, Algorithm, register_algorithm

__all__ = ["ALGORITHMS", "Algorithm", "register_algorithm"]

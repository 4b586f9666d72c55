"""awq: input columns that matter are stored on a finer grid, by scales folded into what is before.

AWQ (Lin et al., 2024, arXiv:2306.00978): errors of a column count as much as its inputs are large,
so columns of large inputs are multiplied by s and what writes these inputs is divided by s. Here

    s_j = (mean |x_j|)^a / (max |w_j|)^(1 - a)

over all matrices that read the input, a from 0 to 1 searched on the output error of the block, its
readers rounded to the format that the sweep packs them in; without scales, if that is best. Edges
(norm to layers, v to o with shared heads, up to down) are found in the running block, in any model
family, see `folding/edges.py`; nothing is stored and nothing runs but the original's layers.

Needs calibration text, and the packing in the same sweep unless `alpha` is given. Wins little where
an error-feedback algorithm (gptq) follows that knows the inputs itself. Fails where: layers have
nothing before them that could take a scale (behind GELU, in models without norms before the
layers, mixtures of experts): they are left as they are, and the report lists them under `notes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress_methods.algorithms import Statistic
from compress_methods.transforms.base import register_transform
from compress_methods.transforms.folding.magnitudes import MeanMagnitude
from compress_methods.transforms.folding.search import Smoothing


@register_transform
@dataclass(frozen=True)
class Awq(Smoothing):
    """Scales that follow the mean magnitude of the inputs."""

    name: ClassVar[str] = "awq"
    statistic: ClassVar[type[Statistic]] = MeanMagnitude

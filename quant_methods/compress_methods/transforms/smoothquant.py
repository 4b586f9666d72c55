"""smoothquant: outliers of activations moved into the weights, where 8 bits hold them.

SmoothQuant (Xiao et al., 2023, arXiv:2211.10438): with one scale per token, a channel of the input
that is fifty times as large as the others leaves them a fiftieth of the 8 bits. Columns of the
weight are multiplied by

    s_j = max |x_j|^a / max |w_j|^(1 - a)

and what writes x_j is divided by it: the difficulty is shared between both. The paper takes a = 0.5
for all layers; here every edge searches its own on the output error of the block, with rounded
weights and inputs quantized as the format that follows will do it. Edges as `awq` finds them.

Needs calibration text that shows the outliers, and the packing in the same sweep unless `alpha` is
given. Changes next to nothing for formats of weights alone in groups: use `awq` there. Fails where:
as `awq`; a layer behind GELU keeps its outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress_methods.algorithms import Statistic
from compress_methods.transforms.base import register_transform
from compress_methods.transforms.folding.magnitudes import PeakMagnitude
from compress_methods.transforms.folding.search import Smoothing


@register_transform
@dataclass(frozen=True)
class SmoothQuant(Smoothing):
    """Scales that follow the largest inputs."""

    name: ClassVar[str] = "smoothquant"
    statistic: ClassVar[type[Statistic]] = PeakMagnitude

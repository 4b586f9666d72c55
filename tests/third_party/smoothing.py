"""smooth: scales moved from the inputs of q, k and v into their columns, the norm before them
divided by the same. How far is tried with the format that packs them."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_methods.algorithms import InputNorms
from compress_methods.transforms import Part, Pass, register_transform

LEAVES = ("q_proj", "k_proj", "v_proj")
POWERS = (0.0, 0.25, 0.5)


@register_transform
@dataclass(frozen=True)
class Smooth(Pass):
    """For blocks that are named as Llama's."""

    name: ClassVar[str] = "smooth"

    def visit(self, part: Part) -> None:
        if part.index is None or part.index < 0:
            return
        slots = [s for s in part.slots if s.module.rpartition(".")[2] in LEAVES]
        seen = part.statistics({slots[0].module: (InputNorms,)})[slots[0].module]
        norms = InputNorms.of(seen).sqrt().clamp(min=1e-6)
        tried = {power: self._error(part, slots, norms, scale(norms, power)) for power in POWERS}
        factors = scale(norms, min(tried, key=tried.__getitem__))
        for slot in slots:
            part.replace(slot.parameter, part.weight(slot) * factors)
        norm = f"{slots[0].module.partition('.self_attn')[0]}.input_layernorm.weight"
        part.replace(norm, part.tensor(norm) / factors)

    def _error(self, part: Part, slots: list, norms: Tensor, factors: Tensor) -> float:
        """What the packing would lose of the outputs, inputs taken as uncorrelated."""
        total = 0.0
        for slot in slots:
            fmt, weight = part.packing(slot), part.weight(slot) * factors
            if fmt is not None:
                lost = weight - fmt.matrix(fmt.nearest(weight))
                total += float((lost * (norms / factors)).square().sum())
        return total


def scale(norms: Tensor, power: float) -> Tensor:
    factors = norms**power
    return factors / factors.log().mean().exp()

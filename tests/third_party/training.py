"""train_block: weights trained so that the block, rounded as it will be packed, does what the
original's does (straight-through gradients)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from compress_methods.transforms import Part, Pass, register_transform


@register_transform
@dataclass(frozen=True)
class TrainBlock(Pass):
    """`steps` of Adam over the calibration text, four sequences at a time."""

    steps: int = 24
    rate: float = 1e-3
    name: ClassVar[str] = "train_block"
    needs_teacher: ClassVar[bool] = True

    def visit(self, part: Part) -> None:
        if part.index is None or part.index < 0:
            return
        slots = [slot for slot in part.slots if part.packing(slot) is not None]
        latent = [part.weight(slot).clone() for slot in slots]
        weights = [part.module.get_submodule(self._inside(part, s.module)).weight for s in slots]
        optimizer = torch.optim.Adam(latent, self.rate)
        inputs, wanted = part.inputs(), part.teacher()
        for step in range(self.steps):
            for slot, weight, value in zip(slots, weights, latent, strict=True):
                fmt = part.packing(slot)
                weight.data.copy_(fmt.matrix(fmt.nearest(value)))
                weight.requires_grad_(True)
            rows = slice(step * 4 % len(inputs), step * 4 % len(inputs) + 4)
            with torch.enable_grad():
                loss = (part.forward(inputs[rows]) - wanted[rows]).square().mean()
                gradients = torch.autograd.grad(loss, weights)
            for value, gradient in zip(latent, gradients, strict=True):
                value.grad = gradient
            optimizer.step()
        for slot, weight, value in zip(slots, weights, latent, strict=True):
            weight.requires_grad_(False)
            part.replace(slot.parameter, value)

    def _inside(self, part: Part, module: str) -> str:
        """The name of a module of the block inside it."""
        names = dict(part.module.named_modules())
        return next(name for name in names if name and module.endswith(f".{name}"))

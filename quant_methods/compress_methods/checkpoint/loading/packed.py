"""Linear layers that stay packed in a transformers model: for use without vLLM at the memory of the
compressed checkpoint, and as the frozen base of an adapter (QLoRA, Dettmers et al., 2023,
arXiv:2305.14314).

Without gradients the product is the best kernel's, as in a server. With them the matrix is unpacked
for the product and again for the gradient of its input; the stored numbers get none. The first
product without gradients keeps the kernel's own layout beside what is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.checkpoint.compressed import Matrix
from compress_methods.errors import CheckpointError
from compress_methods.formats import Stored
from compress_methods.kernels import Prepared, matmul, prepare
from compress_methods.model.skeleton import Skeleton


class PackedLinear(nn.Linear):
    """A linear layer with an empty `weight`: adapters can be added to it, not merged into it."""

    def __init__(
        self,
        matrix: Matrix,
        bias: nn.Parameter | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.rows, matrix.cols
        stored = matrix.stored().to(device)
        self.format, self._names = stored.format, list(stored.tensors)
        for name, tensor in stored.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        # Whoever asks a layer's weight for dtype and device gets an answer; no values.
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("bias", bias)
        self._prepared: Prepared | None = None

    @property
    def stored(self) -> Stored:
        """The matrix, where the layer is."""
        tensors = {name: getattr(self, name) for name in self._names}
        return Stored.whole(self.format, tensors, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            out = _Product.apply(x, self.stored)
            return out if self.bias is None else out + self.bias
        if self._prepared is None or self._prepared.flat()[0].device != x.device:
            self._prepared = prepare(self.stored)
        return matmul(x, self._prepared, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.describe()}"


class _Product(torch.autograd.Function):
    """x W^T, whose gradient goes to x alone; through the rounding of inputs it passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Stored) -> Tensor:
        ctx.stored = stored
        return stored.format.quantize_activations(x) @ stored.values().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.stored.values().to(gradient.dtype), None


def keep_packed(
    skeleton: Skeleton, matrices: dict[str, Matrix], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Put packed layers in place of the linear layers that have a matrix; returns the parameters
    that are gone, each with its module. What is no linear layer stays to be unpacked."""
    gone = {}
    for module, matrix in matrices.items():
        slot = skeleton.slots.get(module)
        found = skeleton.module(module) if slot is not None and slot.is_plain else None
        if slot is None or type(found) is not nn.Linear or module in skeleton.tied:
            continue
        parent, _, leaf = module.rpartition(".")
        setattr(skeleton.module(parent), leaf, PackedLinear(matrix, found.bias, device, dtype))
        gone[slot.parameter] = module
    skeleton.model.save_pretrained = _refuse_to_save
    return gone


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise CheckpointError(
        "a packed model is saved already, in the directory it came from; save its adapter, or load "
        "it unpacked"
    )

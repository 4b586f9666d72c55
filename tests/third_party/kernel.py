"""unpacked: a kernel that outranks ours on integers, for machines with memory to spare: weights in
the dtype of the activations, multiplied by torch."""

import logging
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.integer import Integer
from compress_methods.kernels import Kernel, Prepared, Want, register_kernel

logger = logging.getLogger("vllm.vllm_compress")


@register_kernel
class Unpacked(Kernel):
    name: ClassVar[str] = "unpacked"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return 1000 if isinstance(stored.format, Integer) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        logger.warning("unpacked takes a matrix of %d rows", stored.size[0])
        weight = stored.values().to(want.dtype or torch.float32)
        return Prepared(self.name, *stored.size, [weight], stored.format)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, prepared.tensors[0].to(x.dtype), bias)

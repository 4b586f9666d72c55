"""The torch op of a layer of experts, in any format, on CPUs.

    vllm_compress::experts(x, scores, chosen, tensors, biases, local, plan)
    [tokens, hidden] -> the same

Tokens are sorted by expert; each expert's go through its two prepared matrices by the kernels that
these were prepared for, the activation between them, and are added up by their scores. `biases` of
the matrices are float32 [experts, outputs] each, or there are none. `local` maps experts to those
of this rank, -1 elsewhere. `plan` is all that is not a tensor, parsed once. Where all experts are
prepared alike, which is all formats but those that keep what they need, tensors [experts, ...] hold
the same tensor of all: a call takes a few instead of hundreds.
Fails where a CUDA graph would capture it: how many tokens an expert gets decides what runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from compress_methods.kernels import Prepared, rebuild
from compress_methods.kernels.base import tensors_of
from compress_methods.kernels.cpu.library import empty_bytes
from compress_methods.system.portions import portions
from vllm_compress.kernels.ops import LIBRARY, Product, product_of

Activation = Callable[[Tensor], Tensor]
Matrix = tuple[str, list[Tensor]]
"""What `Prepared.text` says of a matrix, and its tensors."""
Run = tuple[int, int, int]
"""An expert, its first token among those sorted, how many it has."""
TOGETHER = 256
"""Tokens whose activations are computed at once: few operations where each expert gets a few."""
_PRODUCTS: dict[str, Product] = {}


def _gated(function: Activation) -> Activation:
    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up

    return gated


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return x.relu().square()


def _gpt_oss(x: Tensor) -> Tensor:
    """GPT-OSS's own: silu with a slope, both halves clipped, and 1 added to what is gated."""
    gate, up = x.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


PLAIN: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}
ACTIVATIONS = {name: _gated(function) for name, function in PLAIN.items() if name != "relu2"}
ACTIVATIONS["swigluoai"] = _gpt_oss
ACTIVATIONS |= {f"{name}_no_mul": function for name, function in PLAIN.items()}
"""By the names vLLM has for them; gates lie before what they gate."""


@dataclass(frozen=True)
class Plan:
    """`first` and `last`: texts of the prepared matrices, one for all experts or one for each.
    `on_input`: scores multiply what experts get, not what they give."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    activation: str
    on_input: bool

    def text(self) -> str:
        """`read` takes it back."""
        return json.dumps([self.first, self.last, self.activation, self.on_input])

    @staticmethod
    @cache
    def read(text: str) -> Plan:
        """The plan of a text."""
        first, last, activation, on_input = json.loads(text)
        return Plan(tuple(first), tuple(last), activation, on_input)

    def matrices(self, expert: int, tensors: Sequence[Tensor]) -> tuple[Matrix, Matrix]:
        """An expert's two matrices."""
        if len(self.first) == 1:
            count = tensors_of(self.first[0])
            mine = [tensor[expert] for tensor in tensors]
            return (self.first[0], mine[:count]), (self.last[0], mine[count:])
        place = sum(map(tensors_of, self.first[:expert] + self.last[:expert]))
        middle = place + tensors_of(self.first[expert])
        end = middle + tensors_of(self.last[expert])
        return (
            (self.first[expert], list(tensors[place:middle])),
            (self.last[expert], list(tensors[middle:end])),
        )


def stack(experts: Iterator[tuple[Prepared, Prepared]], count: int) -> tuple[Plan, list[Tensor]]:
    """Texts and tensors of as many experts; activation and scores are to be filled in."""
    texts: list[tuple[str, str]] = []
    apart: list[list[Tensor]] = []
    together: list[Tensor] = []
    for expert, (first, last) in enumerate(experts):
        mine = [*first.flat(), *last.flat()]
        texts.append((first.text(), last.text()))
        if not together and not apart:
            together = [_room(count, t) for t in mine]
        if together and texts[0] == texts[-1] and _alike(mine, together):
            for all_of, one in zip(together, mine, strict=True):
                all_of[expert] = one
            continue
        if together:  # from here on they differ
            apart = [[t[i] for t in together] for i in range(expert)]
            together = []
        apart.append(mine)
    if together or not texts:
        texts = texts[:1]
    plan = Plan(tuple(t[0] for t in texts), tuple(t[1] for t in texts), "silu", False)
    return plan, together or [tensor for mine in apart for tensor in mine]


def _room(count: int, tensor: Tensor) -> Tensor:
    """For as many like it; bytes are weights, which huge pages read faster."""
    if tensor.dtype == torch.uint8 and tensor.device.type == "cpu":
        return empty_bytes(count, *tensor.shape)
    return tensor.new_empty(count, *tensor.shape)


def _alike(mine: Sequence[Tensor], together: Sequence[Tensor]) -> bool:
    return [(t.shape, t.dtype) for t in mine] == [(t.shape[1:], t.dtype) for t in together]


def _multiply(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    text, tensors = matrix
    if text not in _PRODUCTS:
        _PRODUCTS[text] = product_of(rebuild(text, tensors))
    return _PRODUCTS[text](x, tensors, bias)


def experts(
    x: Tensor,
    scores: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    biases: list[Tensor],
    local: Tensor | None,
    plan: str,
) -> Tensor:
    """What experts make of tokens x [tokens, hidden]; `scores` and `chosen` [tokens, k]."""
    made = Plan.read(plan)
    between = ACTIVATIONS[made.activation]
    mine = (chosen if local is None else local[chosen.long()]).flatten()
    order = mine.argsort(stable=True)
    rows, score = order // chosen.shape[1], scores.flatten()[order, None].float()
    out = torch.zeros_like(x, dtype=torch.float32)
    for runs in _together((mine + 1).bincount().tolist()):
        matrices = [made.matrices(expert, tensors) for expert, _, _ in runs]
        sizes = [size for _, _, size in runs]
        added = [[bias[expert] for expert, _, _ in runs] for bias in biases]
        of_first, of_last = added or ([None] * len(runs), [None] * len(runs))
        span = slice(runs[0][1], runs[0][1] + sum(sizes))
        given = x[rows[span]]
        if made.on_input:
            given = (given * score[span]).to(x.dtype)
        inner = _products(given, [first for first, _ in matrices], of_first, sizes)
        inner = between(inner.float()).to(x.dtype)
        found = _products(inner, [last for _, last in matrices], of_last, sizes).float()
        out.index_add_(0, rows[span], found if made.on_input else found * score[span])
    return out.to(x.dtype)


def _together(counts: Sequence[int]) -> Iterator[list[Run]]:
    """Experts that any token goes to, as many at once as have `TOGETHER` tokens. `counts` [1 +
    experts]: first of those that other ranks have."""
    runs: list[Run] = []
    start = sum(counts[:1])
    for expert, size in enumerate(counts[1:]):
        if size:
            runs.append((expert, start, size))
        start += size
    return portions(runs, lambda run: run[2], TOGETHER)


def _products(
    x: Tensor,
    matrices: Sequence[Matrix],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> Tensor:
    """Each matrix with its tokens, which lie one after another, and its bias."""
    if len(matrices) == 1:
        return _multiply(x, matrices[0], biases[0])
    parts = zip(x.split(list(sizes)), matrices, biases, strict=True)
    return torch.cat([_multiply(*part) for part in parts])


def experts_shape(
    x: Tensor,
    scores: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    biases: list[Tensor],
    local: Tensor | None,
    plan: str,
) -> Tensor:
    """Shape and dtype of `experts`."""
    return torch.empty_like(x)


LIBRARY.define(
    "experts(Tensor x, Tensor scores, Tensor chosen, Tensor[] tensors, Tensor[] biases, "
    "Tensor? local, str plan) -> Tensor"
)
LIBRARY.impl("experts", experts, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_compress::experts", experts_shape, lib=LIBRARY)

"""One run of a block, forwards and backwards, that shows which matrix reads what another writes.

Nothing is known of the block but its modules. For a random functional c of the block's outputs,
let d be the gradient of <c, block(x)> by an output y of a module, or by what a module reads. Then

    sum over tokens of y_i d_i        is how <c, block(x)> grows with channel i of that output, and
    sum over tokens of x_j (d W)_j    how it grows with column j of a matrix W that reads x.

Where dividing what is written and multiplying the columns that read it changes nothing, the two
sums are equal, and they are by accident for no other pair. Every sequence of the batch is a
functional of its own; a small batch is run with several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.model.slot import Slot
    from compress_methods.transforms.base import Part

FUNCTIONALS = 4
"""At the least; more tell channels apart that are equal in one by accident."""


@dataclass
class Growth:
    """`sums` [functionals, channels] of the products, `sizes` [channels] of their magnitudes."""

    sums: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, values: Tensor, gradients: list[Tensor], sequences: int) -> Growth:
        """values [..., channels] and gradients like it, one for each backward pass."""
        width = values.shape[-1]
        x = values.detach().reshape(sequences, -1, width)
        sums, sizes = [], []
        for gradient in gradients:
            product = x.double() * gradient.reshape(x.shape)
            sums.append(product.sum(1))
            sizes.append(product.abs().sum(1))
        return cls(torch.cat(sums), torch.cat(sizes).amax(0))

    def summed(self, sequences: int) -> Growth:
        """For the first functional alone, over all sequences."""
        return Growth(self.sums[:sequences].sum(0)[None], self.sizes * sequences)


@dataclass
class Run:
    """What a module read and wrote, and the gradients of the latter, one of each backward pass."""

    inputs: Tensor
    outputs: Tensor
    gradients: list[Tensor] = field(default_factory=list)


class Trace:
    """`matrices`: the slots that ran once on every token, in order, `norms`: modules with a gain
    for each of their outputs, by their names in the model; `states` what the block was given.
    `arrivals`: gradients by what the norms read, `ends`: those by the block's outputs."""

    def __init__(self, part: Part, states: Tensor) -> None:
        self.part, self.states, prefix = part, states, part.prefix
        self.sequences = len(states)
        self.runs: dict[str, Run] = {}
        self.arrivals: dict[str, list[Tensor]] = {}
        self.ends: list[Tensor] = []
        self._names = {f"{prefix}.{n}" if n else prefix: m for n, m in part.module.named_modules()}
        slots = {slot.module: slot for slot in part.slots if not slot.index}
        norms = [name for name, module in self._names.items() if _has_gains(module)]
        self._run([*norms, *(name for name in slots if name in self._names)])
        self.matrices = {name: slots[name] for name in self.runs if name in slots}
        self.norms = [name for name in self.runs if name not in slots]

    def module(self, name: str) -> nn.Module:
        return self._names[name]

    def writes(self, name: str) -> Growth:
        """Of the channels that a module writes."""
        run = self.runs[name]
        return Growth.of(run.outputs, run.gradients, self.sequences)

    def reads(self, slot: Slot) -> Growth:
        """Of the columns of a matrix."""
        run, weight = self.runs[slot.module], self.part.weight(slot)
        back = [gradient @ weight for gradient in run.gradients]
        return Growth.of(run.inputs, back, self.sequences)

    def loose(self) -> dict[str, Tensor]:
        """Gradients by the parameters that are no module's own matrix, such as experts' and their
        router's, for the first functional of all sequences."""
        mine = {
            f"{name}.{leaf}": parameter
            for name, module in self._names.items()
            if name not in self.runs
            for leaf, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() > 1
        }
        try:
            for parameter in mine.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                out = self.part.forward(self.states)
                if out.requires_grad:
                    out.backward(self.ends[0])
            return {n: p.grad for n, p in mine.items() if p.grad is not None}
        finally:
            for parameter in mine.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def _run(self, names: list[str]) -> None:
        twice: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def record(_: Any, args: tuple[Any, ...], output: Any) -> None:
                x = args[0] if args else None
                if name in self.runs or x is None or not _whole(output, self.states):
                    twice.add(name)
                    return
                run = self.runs[name] = Run(x.detach(), output.detach())
                output.register_hook(run.gradients.append)
                if x.requires_grad and _has_gains(self._names[name]):
                    x.register_hook(self.arrivals.setdefault(name, []).append)

            return record

        hooks = [self._names[name].register_forward_hook(hook(name)) for name in names]
        draw = torch.Generator().manual_seed(0)
        try:
            with torch.enable_grad():
                leaf = self.states.clone().requires_grad_()
                out = self.part.forward(leaf.clone())
                for _ in range(max(1, FUNCTIONALS // self.sequences)):
                    functional = torch.randn(out.shape, generator=draw).to(out)
                    self.ends.append(functional)
                    out.backward(functional, retain_graph=True)
        finally:
            for handle in hooks:
                handle.remove()
        for name in [n for n, run in self.runs.items() if n in twice or not run.gradients]:
            del self.runs[name]


def _has_gains(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _whole(output: Any, states: Tensor) -> bool:
    """Whether the output is a tensor with a row for every token, that depends on the states."""
    tokens = states.shape[0] * states.shape[1]
    return (
        isinstance(output, torch.Tensor)
        and output.requires_grad
        and output.numel() == tokens * output.shape[-1]
    )

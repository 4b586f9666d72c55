"""The residual stream of a block: where matrices add to it, and by how much two runs differ there.

No family's names are known here. A matrix adds to the stream if a change of its output arrives
unchanged at the input of a later module of the block, or at the block's output. The last such place
holds the sum, and less the matrix's own output it is the stream that the matrix adds to. Where
something comes between the two (a norm of the output, a scale), the place found lies before it and
the stream is nothing, which is right: nothing is added there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OUTPUT = ""
"""The place that is the block's output; others are modules of the block, whose input it is."""
CHANGE, TOLERANCE = 0.5, 0.02
"""The change's size against the stream's, and the error of what arrives that rounding may cause."""


class _Seen(Exception):
    """Ends a forward pass once everything was seen that it was run for."""


Forward = Callable[[], Tensor]


@dataclass
class Watched:
    """Tensors of one forward pass of a block: `inputs` of matrices and the stream `beside` them, by
    module names inside the block."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)


def watch(
    block: nn.Module, names: Sequence[str], places: Mapping[str, str], forward: Forward
) -> Watched:
    """What goes into the modules `names`, and the stream that those in `places` add to, while
    `forward` runs the block: no further than it has to."""
    seen = Watched()
    outputs: dict[str, Tensor] = {}
    with _watching(block, names, places, seen, outputs):
        try:
            output = forward()
        except _Seen:
            return seen
    for name, own in outputs.items():
        seen.beside[name] = output - own
    return seen


@contextmanager
def _watching(
    block: nn.Module,
    names: Sequence[str],
    places: Mapping[str, str],
    seen: Watched,
    outputs: dict[str, Tensor],
) -> Iterator[None]:
    """With hooks that fill `seen`, and `outputs` of those that add to the block's output."""
    readers: dict[str, list[str]] = {}
    for name, place in places.items():
        readers.setdefault(place, []).append(name)

    def stop_if_done() -> None:
        if len(seen.inputs) == len(names) and len(seen.beside) == len(places):
            raise _Seen

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.inputs[name] = args[0]
            stop_if_done()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            outputs[name] = out.clone()  # what follows may add to it in place

        return hook

    def arrives(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name in readers[place]:
                seen.beside[name] = args[0] - outputs.pop(name)
            stop_if_done()

        return hook

    with ExitStack() as hooks:
        for name in names:
            module = block.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(before(name)).remove)
        for name in places:
            module = block.get_submodule(name)
            hooks.callback(module.register_forward_hook(after(name)).remove)
        for place in readers.keys() - {OUTPUT}:
            module = block.get_submodule(place)
            hooks.callback(module.register_forward_pre_hook(arrives(place)).remove)
        yield


@torch.no_grad()
def find_places(
    block: nn.Module, names: Iterable[str], states: Tensor, forward: Forward
) -> dict[str, str]:
    """Of the modules `names` those that add to the stream, and where it can be seen.

    `forward` runs the block on a few `states` and returns its output.
    """
    steps, output = _run(block, states, forward)
    found: dict[str, str] = {}
    for name in names:
        change: list[Tensor] = []
        changed, end = _run(block, states, forward, name, change)
        if not change or [place for place, _ in steps] != [place for place, _ in changed]:
            continue  # it did not run, or sent tokens another way (a router)
        later = [*zip(steps, changed, strict=True), ((OUTPUT, output), (OUTPUT, end))]
        for (place, old), (_, new) in reversed(later):
            if _arrived(new - old, change[0]):
                found[name] = place
                break
    return found


def _arrived(difference: Tensor, change: Tensor) -> bool:
    if difference.shape != change.shape:
        return False
    return float((difference - change).norm()) <= TOLERANCE * float(change.norm())


def _run(
    block: nn.Module,
    states: Tensor,
    forward: Forward,
    changed: str | None = None,
    change: list[Tensor] | None = None,
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Inputs shaped like the states, of all modules in the order they run in, and the output: of
    the first sequence, which tells as much as all. `change` gets what was added to the output of
    `changed`."""
    steps: list[tuple[str, Tensor]] = []

    def step(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == states.shape:
                steps.append((name, args[0][:1].clone()))

        return hook

    def add(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        assert change is not None
        if out.shape != states.shape:
            return None
        pattern = torch.arange(out.numel(), device=out.device).reshape(out.shape) % 3 - 1
        added = (pattern * CHANGE * states.float().square().mean().sqrt()).to(out.dtype)
        change.append(added[:1])
        return out + added

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(step(name)).remove)
        if changed is not None:
            handle = block.get_submodule(changed).register_forward_hook(add)
            hooks.callback(handle.remove)
        output = forward()
    return steps, output[:1]

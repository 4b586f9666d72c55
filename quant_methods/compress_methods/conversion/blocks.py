"""Running a model one decoder block at a time, with the weights of that block alone in memory.

How the blocks are called (masks, rotary tables, layer types) is recorded once by running the real
model with every block replaced by a stub, so no model family needs its own code. All sequences
have the same length and go through in equal batches, hence one recording serves them all. What
comes after the blocks runs the same way: stubs again, the last one returning the stored states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.algorithms.base import GATHERERS, Gathered, Needs
from compress_methods.loading import set_parameter
from compress_methods.skeleton import Skeleton

MAX_BATCH = 8
STATES = "hidden_states"


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been recorded."""


@dataclass
class Call:
    """How the model calls one block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stub(nn.Module):
    """Stands in for a block; anything else the model asks of it is answered by the block."""

    def __init__(self, inner: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["inner"] = inner
        self.__dict__["answer"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.__dict__["answer"](*args, **kwargs)


def batch_size(*counts: int) -> int:
    """Largest batch up to `MAX_BATCH` that divides every count of sequences."""
    common = gcd(*counts)
    return next(b for b in range(min(MAX_BATCH, common), 0, -1) if common % b == 0)


class BlockRunner:
    """Feeds hidden states [sequences, length, hidden] through one materialized block at a time."""

    def __init__(self, skeleton: Skeleton, batch: int) -> None:
        self.skeleton = skeleton
        self.batch = batch
        self.calls: list[Call] = []

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put float32 values in place of meta parameters (names of the model)."""
        for name, tensor in tensors.items():
            value = tensor.float() if tensor.is_floating_point() else tensor
            set_parameter(self.skeleton.model, name, value)

    def unload(self, prefix: str) -> None:
        """Send the parameters under a module name back to the meta device."""
        module = self.skeleton.module(prefix)
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = nn.Parameter(
                        parameter.to("meta"), requires_grad=False
                    )

    @torch.no_grad()
    def embed(self, tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """Hidden states before the first block, recording how blocks are called.

        tokens [sequences, length]; `table` [len(rows), hidden] holds only the sorted token ids
        `rows` that occur.
        """
        embedding = self.skeleton.module(self.skeleton.embedding)
        local = torch.searchsorted(rows, tokens)
        old = embedding.weight
        embedding._parameters["weight"] = nn.Parameter(table.float(), requires_grad=False)
        states = []
        try:
            for ids in local.split(self.batch):
                states.append(self._first_states(ids))
        finally:
            embedding._parameters["weight"] = old
        return torch.cat(states)

    def _first_states(self, ids: Tensor) -> Tensor:
        calls: list[Call] = []
        first: list[Tensor] = []
        count = len(self.skeleton.blocks)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            states = kwargs.pop(STATES) if STATES in kwargs else args[0]
            calls.append(Call(args[1:], kwargs))
            first.append(states)
            if len(calls) == count:
                raise _Stop
            return states

        with self._stubs([record] * count):
            self._forward(self.skeleton.model.base_model, input_ids=ids)
        self.calls = calls
        return first[0].float()

    @contextmanager
    def _stubs(self, answers: list[Callable[..., Tensor]]) -> Iterator[None]:
        blocks = self.skeleton.blocks
        originals = list(blocks)
        for i, answer in enumerate(answers):
            blocks[i] = _Stub(originals[i], answer)
        try:
            yield
        finally:
            for i, block in enumerate(originals):
                blocks[i] = block

    def _forward(self, module: nn.Module, **inputs: Tensor) -> Any:
        try:
            return module(**inputs, use_cache=False)
        except _Stop:
            return None

    @torch.no_grad()
    def run(self, index: int, states: Tensor, keep: bool = True) -> None:
        """Feed all states through block `index`; `keep` replaces them by the outputs, in place."""
        block, call = self.skeleton.blocks[index], self.calls[index]
        for start in range(0, len(states), self.batch):
            out = block(states[start : start + self.batch], *call.args, **call.kwargs)
            if keep:
                states[start : start + self.batch] = out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def gather(
        self, index: int, states: Tensor, modules: Mapping[str, Needs]
    ) -> list[tuple[list[str], Gathered]]:
        """What each module's input says, per group of modules that read the same input."""
        with self._gathering(modules) as groups:
            self.run(index, states, keep=False)
        return groups

    @torch.no_grad()
    def gather_head(self, states: Tensor, needs: Needs) -> Gathered:
        """The same for the output head; needs what lies between blocks and head materialized."""
        name = self.skeleton.head
        with self._gathering({name: needs}, stop=True) as groups:
            for piece in states.split(self.batch):
                self._after(piece)
        return groups[0][1]

    @contextmanager
    def _gathering(
        self, modules: Mapping[str, Needs], stop: bool = False
    ) -> Iterator[list[tuple[list[str], Gathered]]]:
        groups: list[tuple[list[str], Gathered]] = []
        owner: dict[str, int] = {}
        seen: list[Tensor] = []

        def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if name not in owner:
                same = next((i for i, other in enumerate(seen) if other is x), None)
                if same is None or GATHERERS[modules[name]] is not type(groups[same][1]):
                    same = len(groups)
                    seen.append(x)
                    groups.append(([], GATHERERS[modules[name]](x.shape[-1], x.device)))
                owner[name] = same
                groups[same][0].append(name)
            names, gathered = groups[owner[name]]
            if names[0] == name and gathered is not None:
                gathered.add_batch(x)
            if stop:
                raise _Stop

        handles = [
            self.skeleton.module(name).register_forward_pre_hook(
                lambda module, args, name=name: hook(name, module, args)
            )
            for name in modules
        ]
        try:
            yield groups
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[sequences, length, vocabulary] float32 of states after the last block."""
        return self._after(states).logits.float()

    def _after(self, states: Tensor) -> Any:
        count = len(self.skeleton.blocks)

        def passes(*args: Any, **kwargs: Any) -> Tensor:
            return kwargs[STATES] if STATES in kwargs else args[0]

        answers: list[Callable[..., Tensor]] = [passes] * (count - 1)
        answers.append(lambda *args, **kwargs: states)
        table = self.skeleton.module(self.skeleton.embedding).weight
        inputs = torch.zeros(*states.shape[:2], table.shape[1])
        with self._stubs(answers):
            return self._forward(self.skeleton.model, inputs_embeds=inputs)

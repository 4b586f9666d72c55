"""Running a model one block at a time, with the weights of that block alone in memory.

How the blocks are called (masks, rotary tables, layer types) is recorded once by running the real
model with every block replaced by a stub, so no model family needs its own code. All sequences
have the same length and go through in equal batches, hence one recording serves them all; a model
that calls its blocks with something of the tokens is refused. What comes after the blocks runs the
same way: stubs again, the last one returning the stored states.

States lie in main memory and visit the device batch by batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.model.experts import owner_of, run_one_by_one, watch_experts
from compress_methods.model.recorded import Call, answers_besides, require_same_calls
from compress_methods.model.skeleton import Skeleton, set_parameter
from compress_methods.model.slot import Slot

STATES = "hidden_states"
Hook = Callable[[str, nn.Module, tuple[Any, ...]], None]


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been recorded."""


class _Stub(nn.Module):
    """Stands in for a block; anything else the model asks of it is answered by the block."""

    def __init__(self, inner: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["inner"] = inner
        self.__dict__["answer"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](*args, **kwargs)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states a block is called with, and the rest."""
    if STATES in kwargs:
        return kwargs[STATES], Call(args, {k: v for k, v in kwargs.items() if k != STATES})
    return args[0], Call(args[1:], kwargs)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put what is real of a model without weights, such as rotary tables, on a device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


class BlockRunner:
    """Feeds hidden states [sequences, length, hidden] through one materialized block at a time.

    `dtype` is what weights and states are computed in: float32, or the model's own.
    `all_experts`: hooks see every token at every expert.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batch: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        all_experts: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.batch = batch
        self.all_experts = all_experts
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.calls: list[Call] = []
        self._recorded = 0
        self._besides: dict[type[nn.Module], tuple[Any, ...] | None] = {}
        if self.device.type == "cpu":
            run_one_by_one(skeleton.model)
        else:
            move_buffers(skeleton.model, self.device)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put values in place of meta parameters (names of the model)."""
        twice = {owner: alias for alias, owner in self.skeleton.duplicates.items()}
        for name, tensor in tensors.items():
            value = tensor.to(self.device)
            if value.is_floating_point():
                value = value.to(self.dtype)
            set_parameter(self.skeleton.model, name, value)
            if name in twice:
                set_parameter(self.skeleton.model, twice[name], value)

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
        places = self._places(rows)
        local = places[torch.searchsorted(rows, tokens)]
        old, padding = embedding.weight, embedding.padding_idx
        value = table.new_zeros(int(places.max()) + 1, table.shape[1])
        value[places] = table
        value = value.to(self.device, self.dtype)
        embedding._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        # Ids are renumbered, so the padding token's says nothing (and may be out of range).
        embedding.padding_idx = None
        states = []
        try:
            for ids in local.split(self.batch):
                states.append(self._first_states(ids.to(self.device)))
            if len(states) == 1:
                # One batch has nothing to be compared with: the same with other tokens.
                others = torch.searchsorted(rows, tokens[: self.batch]) + 1
                self._first_states(places[others.remainder(len(rows))].to(self.device))
        finally:
            embedding._parameters["weight"] = old
            embedding.padding_idx = padding
        return torch.cat(states)

    def _places(self, rows: Tensor) -> Tensor:
        """Where the sorted token ids `rows` lie in the table of those that occur.

        Encoders may count no position for the padding's id: no other token gets its place.
        """
        pad = getattr(self.skeleton.model.config, "pad_token_id", None)
        if not self.skeleton.architecture.only_blocks or pad is None:
            return torch.arange(len(rows))
        is_pad = rows == pad
        places = torch.arange(len(rows)) - is_pad.cumsum(0)
        return torch.where(is_pad, pad, places + (places >= pad))

    def _first_states(self, ids: Tensor) -> Tensor:
        calls: list[Call] = []
        first: list[Tensor] = []
        blocks = list(self.skeleton.blocks)

        def record(*args: Any, **kwargs: Any) -> Any:
            states, call = _split(args, kwargs)
            index = len(calls)
            calls.append(call)
            first.append(states)
            if len(calls) == len(blocks):
                raise _Stop
            return self._answer(blocks[index], call, states)

        with self._stubs([record] * len(blocks)):
            self._forward(self.skeleton.model.base_model, input_ids=ids)
        if self.calls:
            require_same_calls(self.calls, calls)
        else:
            self.calls, self._recorded = calls, len(ids)
        return first[0].float().cpu()

    def _answer(self, block: nn.Module, call: Call, states: Tensor) -> Any:
        """States as the block would hand them on, alone or first in a tuple."""
        kind = type(block)
        if kind not in self._besides:
            self._besides[kind] = answers_besides(block, call, states)
        besides = self._besides[kind]
        return states if besides is None else (states, *besides)

    @contextmanager
    def _stubs(self, answers: list[Callable[..., Any]]) -> Iterator[None]:
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

    def forward(self, index: int, states: Tensor, block: nn.Module | None = None) -> Tensor:
        """Block `index`, or another in its place, of at most one batch of states, on the device;
        differentiable."""
        call = self.calls[index].narrowed(self._recorded, len(states))
        inputs = states.to(self.device, self.dtype, non_blocking=True)
        module = self.skeleton.blocks[index] if block is None else block
        out = module(inputs, *call.args, **call.kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    @torch.no_grad()
    def run(self, index: int, states: Tensor, keep: bool = True) -> None:
        """Feed all states through block `index`; `keep` replaces them by the outputs, in place."""
        for start in range(0, len(states), self.batch):
            out = self.forward(index, states[start : start + self.batch])
            if keep:
                states[start : start + self.batch] = out

    def watch(self, index: int, states: Tensor, modules: Iterable[str], hook: Hook) -> None:
        """Run block `index`, calling `hook(name, module, args)` before each of `modules` runs."""
        with self.hooked(modules, hook):
            self.run(index, states, keep=False)

    @torch.no_grad()
    def watch_head(self, states: Tensor, hook: Hook) -> None:
        """The same for the output head; needs what lies between blocks and head materialized."""

        def last(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            hook(name, module, args)
            raise _Stop

        with self.hooked([self.skeleton.head], last):
            for piece in states.split(self.batch):
                self._after(piece)

    @contextmanager
    def hooked(self, modules: Iterable[str], hook: Hook) -> Iterator[None]:
        """Have `hook` called before each of `modules` runs, or before an expert's matrix would."""
        experts: dict[str, list[Slot]] = defaultdict(list)
        handles = []
        for name in modules:
            slot = self.skeleton.slots.get(name)
            if slot is not None and slot.kind == "experts":
                experts[owner_of(slot)].append(slot)
                continue
            handles.append(
                self.skeleton.module(name).register_forward_pre_hook(
                    lambda module, args, name=name: hook(name, module, args)
                )
            )
        for owner, slots in experts.items():
            module = self.skeleton.module(owner)
            handles.append(
                watch_experts(module, slots, self.skeleton.architecture, hook, self.all_experts)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[sequences, length, vocabulary] float32 of states after the last block; [sequences,
        labels] of a classifier of sequences, the last hidden states of a model without a head."""
        return self.after(states).float().cpu()

    def after(self, states: Tensor) -> Tensor:
        """The same on the device, in the dtype that is computed in; differentiable."""
        out = self._after(states)
        found: Tensor = out.last_hidden_state if self.skeleton.gives_states else out.logits
        return found

    def _after(self, states: Tensor) -> Any:
        blocks = list(self.skeleton.blocks)
        moved = states.to(self.device, self.dtype)
        passed: list[int] = []

        def passes(*args: Any, **kwargs: Any) -> Any:
            given, call = _split(args, kwargs)
            block = blocks[len(passed)]
            passed.append(len(passed))
            return self._answer(block, call, moved if len(passed) == len(blocks) else given)

        table = self.skeleton.module(self.skeleton.embedding).weight
        inputs = torch.zeros(
            *states.shape[:2], table.shape[1], device=self.device, dtype=self.dtype
        )
        with self._stubs([passes] * len(blocks)):
            return self._forward(self.skeleton.model, inputs_embeds=inputs)

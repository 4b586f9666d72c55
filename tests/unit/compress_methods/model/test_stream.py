"""Where matrices add to the residual stream is found in blocks of every build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_methods.model.stream import OUTPUT, find_places, watch

HIDDEN = 16


class Block(nn.Module):
    """Attention is a matrix here; how the parts are put together is what differs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.o = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)

    def mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class Sequential(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.first(x))
        return x + self.mlp(self.second(x))


class Parallel(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return x + self.o(h) + self.mlp(h)


class AfterNorm(Block):
    """As in BERT: the norms are of the sums."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.o(x))
        out: Tensor = self.second(x + self.mlp(x))
        return out


class Sandwich(Block):
    """As in Gemma 2: what is added has been normed, so nothing of it arrives as it was."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.o(x))
        out: Tensor = x + self.second(self.mlp(x))
        return out


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.o(self.first(x))
        out += x
        more = self.mlp(self.second(out))
        more += out
        final: Tensor = more
        return final


PLACES: list[tuple[type[Block], dict[str, str]]] = [
    (Sequential, {"o": "second", "down": OUTPUT}),
    (Parallel, {"o": OUTPUT, "down": OUTPUT}),
    (AfterNorm, {"o": "first", "down": "second"}),
    (Sandwich, {"o": "first", "down": "second"}),
    (InPlace, {"o": "second", "down": OUTPUT}),
]


@pytest.mark.parametrize(("kind", "expected"), PLACES, ids=[k.__name__ for k, _ in PLACES])
def test_places_are_found(kind: type[Block], expected: dict[str, str]) -> None:
    block, states = kind(), torch.randn(2, 5, HIDDEN) * 3
    assert find_places(block, ["o", "up", "down"], states, lambda: block(states)) == expected


@pytest.mark.parametrize("kind", [k for k, _ in PLACES], ids=lambda k: k.__name__)
def test_the_stream_is_what_an_output_is_added_to(kind: type[Block]) -> None:
    block, states = kind(), torch.randn(2, 5, HIDDEN)
    places = find_places(block, ["o", "down"], states, lambda: block(states))
    outputs: dict[str, Tensor] = {}
    for name in places:
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out.clone()})
        )
    with torch.no_grad():
        seen = watch(block, ["o", "up"], places, lambda: block(states.clone()))
    assert set(seen.inputs) == {"o", "up"}
    assert set(seen.beside) == {"o", "down"}
    if kind is Sandwich:
        assert max(float(beside.abs().max()) for beside in seen.beside.values()) == 0
    if kind in (Sequential, InPlace, AfterNorm):
        torch.testing.assert_close(seen.beside["o"], states, rtol=1e-4, atol=1e-5)
    if kind in (Sequential, InPlace):
        torch.testing.assert_close(seen.beside["down"], states + outputs["o"], rtol=1e-4, atol=1e-5)
    if kind is Parallel:
        expected = states + outputs["down"]
        torch.testing.assert_close(seen.beside["o"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_places_of_a_real_block(novels_8m: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(novels_8m, dtype=dtype)
    layer = model.model.layers[3]
    captured: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.arange(3, 35)[None])
    handle.remove()
    states = captured["args"][0]
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    places = find_places(layer, names, states, lambda: layer(states, **captured["kwargs"]))
    assert places == {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT}

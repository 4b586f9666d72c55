"""A model with massive activation outliers that computes what the original does.

    python -m tests.benchmarks.loss.outliers MODEL OUT

No channel of the residual stream can be scaled alone: RMS norms would notice. So the stream is
turned by a reflection that makes its strongest direction one channel, gains folded beforehand, and
then that channel's gains are raised and the columns that read it lowered by the same, until it is
`FACTOR` times as large as the others where layers read it. Both are exact; the result is kept in
float32, so that nothing is rounded. For models named as Llama's, heads untied.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors

FACTOR = 50.0
CHANNEL = 7
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
TOKENS = 2048


def inject(model: Path, out: Path, factor: float = FACTOR) -> Path:
    """Write the model with outliers to `out`; returns it."""
    tensors = {name: t.float() for name, t in read_tensors(model / "model.safetensors").items()}
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    direction, share = _strongest(load_model(model))
    for index in range(layers):
        for norm, readers in READERS.items():
            _fold(tensors, f"model.layers.{index}.{norm}", [f"layers.{index}.{r}" for r in readers])
    _fold(tensors, "model.norm", [])
    reflect = _reflection(direction)
    table = "model.embed_tokens.weight"
    tensors[table] = tensors[table] @ reflect
    tensors["lm_head.weight"] = tensors["lm_head.weight"] @ reflect
    # How much larger than the others the channel is already.
    others = ((1 - share) / (len(direction) - 1)) ** 0.5
    raised = factor * others / share**0.5
    for index in range(layers):
        for name in WRITERS:
            key = f"model.layers.{index}.{name}.weight"
            tensors[key] = reflect @ tensors[key]
        for norm, readers in READERS.items():
            tensors[f"model.layers.{index}.{norm}.weight"][CHANNEL] *= raised
            for name in readers:
                key = f"model.layers.{index}.{name}.weight"
                tensors[key] = tensors[key] @ reflect
                tensors[key][:, CHANNEL] /= raised
    out.mkdir(parents=True, exist_ok=True)
    for path in model.glob("*.json"):
        shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    write_tensors(out / "model.safetensors", {n: t.contiguous() for n, t in tensors.items()})
    return out


def _fold(tensors: dict[str, Tensor], norm: str, readers: list[str]) -> None:
    """Put a norm's gains into what reads it; the head reads the last norm."""
    gains = tensors[f"{norm}.weight"]
    for name in [f"model.{reader}.weight" for reader in readers] or ["lm_head.weight"]:
        tensors[name] = tensors[name] * gains
    tensors[f"{norm}.weight"] = torch.ones_like(gains)


@torch.no_grad()
def _strongest(model: Any) -> tuple[Tensor, float]:
    """The direction that most of what the norms read lies in, and its share of the energy."""
    sums: list[Tensor] = []

    def see(_: Any, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).double()
        x = x / x.norm(dim=1, keepdim=True)
        sums.append(x.T @ x / len(x))

    for layer in model.model.layers:
        for norm in READERS:
            layer.get_submodule(norm).register_forward_pre_hook(see)
    draw = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    model(input_ids=torch.randint(3, size, (TOKENS // 256, 256), generator=draw), use_cache=False)
    values, vectors = torch.linalg.eigh(torch.stack(sums).mean(0))
    return vectors[:, -1].float(), float(values[-1])


def _reflection(direction: Tensor) -> Tensor:
    """The Householder matrix that takes a unit vector to the unit vector of CHANNEL."""
    difference = direction.double().clone()
    difference[CHANNEL] -= 1
    outer = difference[:, None] * difference[None]
    return (torch.eye(len(direction)).double() - 2 * outer / difference.square().sum()).float()


if __name__ == "__main__":
    print(inject(Path(sys.argv[1]), Path(sys.argv[2])))

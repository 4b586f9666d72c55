"""Checkpoints as other tools write them: the same integers in compressed-tensors', AutoGPTQ's and
AutoAWQ's layouts, and the dense model that all of them stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress_methods.formats.integer import Integer, IntegerSolution

PROJECTION = re.compile(r"(model\.layers\.\d+\..*_proj)\.weight")
WITH_HEAD = re.compile(r"(model\.layers\.\d+\..*_proj|lm_head)\.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Write = Callable[[IntegerSolution, int], dict[str, Tensor]]


def pack_words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes along `dim` to int32 words, lowest bits first."""
    lanes = codes.movedim(dim, -1).to(torch.int64).unflatten(-1, (-1, 32 // bits))
    words = sum(lanes[..., i] << (bits * i) for i in range(32 // bits))
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def compressed_tensors(solution: IntegerSolution, bits: int) -> dict[str, Tensor]:
    out = {
        "weight_packed": pack_words(solution.codes, bits, 1),
        "weight_scale": solution.scales,
        "weight_shape": torch.tensor(solution.codes.shape),
    }
    if solution.zeros is not None:
        out["weight_zero_point"] = pack_words(solution.zeros, bits, 0)
    return out


def gptq(solution: IntegerSolution, bits: int) -> dict[str, Tensor]:
    """Zeros of AutoGPTQ are stored less one."""
    groups, rows = solution.scales.T.shape
    zeros = torch.full((groups, rows), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    cols = solution.codes.shape[1]
    return {
        "qweight": pack_words(solution.codes.T, bits, 0),
        "scales": solution.scales.T.contiguous(),
        "qzeros": pack_words(zeros, bits, 1),
        "g_idx": torch.arange(cols, dtype=torch.int32) // (cols // groups),
    }


def awq(solution: IntegerSolution, bits: int) -> dict[str, Tensor]:
    assert solution.zeros is not None

    def shuffled(codes: Tensor) -> Tensor:
        return codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)

    return {
        "qweight": pack_words(shuffled(solution.codes.T), bits, 1),
        "scales": solution.scales.T.contiguous(),
        "qzeros": pack_words(shuffled(solution.zeros.T), bits, 1),
    }


def _compressed_tensors_config(fmt: Integer, head: bool) -> dict[str, Any]:
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "group" if fmt.group_size > 0 else "channel",
        "group_size": fmt.group_size if fmt.group_size > 0 else None,
    }
    targets = ["Linear", "re:.*lm_head"] if head else ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": targets, "weights": weights}},
        "ignore": [] if head else ["lm_head"],
    }


def _gptq_config(fmt: Integer, head: bool) -> dict[str, Any]:
    common = {"bits": fmt.bits, "group_size": fmt.group_size, "desc_act": False}
    return {"quant_method": "gptq", "sym": True, "lm_head": head, **common}


def _awq_config(fmt: Integer, head: bool) -> dict[str, Any]:
    common = {"bits": fmt.bits, "group_size": fmt.group_size, "zero_point": True}
    return {"quant_method": "awq", "version": "gemm", "lm_head": head, **common}


LAYOUTS: dict[str, tuple[Write, Callable[[Integer, bool], dict[str, Any]]]] = {
    "compressed-tensors": (compressed_tensors, _compressed_tensors_config),
    "gptq": (gptq, _gptq_config),
    "awq": (awq, _awq_config),
}


def write_foreign(
    model: Path, out: Path, layout: str, fmt: Integer, head: bool = False, **settings: Any
) -> tuple[Path, Path]:
    """The model's projections, and its output head if wanted, rounded as `fmt` says: in that
    layout, and as dense values. `settings` replace those of the layout's own configuration."""
    write, describe = LAYOUTS[layout]
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        found = (WITH_HEAD if head else PROJECTION).fullmatch(name)
        if found is None:
            stored[name] = dense[name] = tensor
            continue
        solution = fmt.nearest(tensor.float())
        dense[name] = fmt.matrix(solution)
        for part, value in write(solution, fmt.bits).items():
            stored[f"{found[1]}.{part}"] = value
    config = json.loads((model / "config.json").read_text())
    folders = (out / layout, out / f"{layout}-dense")
    for folder, tensors, extra in (
        (folders[0], stored, {"quantization_config": {**describe(fmt, head), **settings}}),
        (folders[1], dense, {}),
    ):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folders

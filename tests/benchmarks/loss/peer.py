"""Run by the interpreter of another tool's environment: quantize a model with that tool.

`python peer.py TOOL MODEL TOKENS OUT SETTINGS`: TOKENS is a file of calibration tokens
[sequences, length], SETTINGS are JSON; OUT gets the model with its rounded weights, not packed, so
that all are evaluated by one program. Imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def auto_round(model: Any, tokenizer: Any, tokens: torch.Tensor, settings: dict[str, Any]) -> Any:
    from auto_round import AutoRound

    more = {"sym": True, "group_size": 128, "batch_size": 8, "device_map": "cpu"}
    tuner = AutoRound(
        model,
        tokenizer,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.split(8)),
        enable_torch_compile=False,
        **{**more, **settings},
    )
    return tuner.quantize()[0]


def hqq(model: Any, tokenizer: Any, tokens: torch.Tensor, settings: dict[str, Any]) -> Any:
    from hqq.core.quantize import Quantizer

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, meta = Quantizer.quantize(
                module.weight.data, nbits=settings["bits"], group_size=128, axis=1, device="cpu"
            )
            module.weight.data = Quantizer.dequantize(packed, meta).float().view_as(module.weight)
    return model


TOOLS = {"auto-round": auto_round, "hqq": hqq}


def main(tool: str, path: str, tokens: str, out: str, settings: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = set(model.state_dict())
    calibration = load_file(tokens)["tokens"]
    found = TOOLS[tool](model, tokenizer, calibration, json.loads(settings))
    state = {name: value for name, value in found.state_dict().items() if name in names}
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain.load_state_dict(state)
    plain.save_pretrained(Path(out))
    tokenizer.save_pretrained(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Makes the mixture beside this file: eight experts a layer, taught by novels-8m what it knows.

    python -m tests.assets.mixture.make FOLDER

novels-8m writes the text and its predictions down, a Qwen3-MoE that knows nothing yet learns them.
All that is needed is in the repository.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[1]
TEACHER = ASSETS / "novels-8m"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
TRAINING: dict[str, Any] = {
    "train": "distill",
    "top_k": 32,
    "sequences": 1536,
    "length": 128,
    "batch": 16,
    "steps": 1200,
    "rate": 0.03,
    "held_out": 16,
}


def fresh(out: Path) -> Path:
    """The mixture before it has learnt anything, with novels-8m's vocabulary."""
    import torch
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    teacher = AutoConfig.from_pretrained(TEACHER)
    tokens = {key: getattr(teacher, key) for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **tokens))
    model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER:
        shutil.copy(TEACHER / name, out / name)
    return out


def make(out: Path, **changes: Any) -> dict[str, Any]:
    """Train it into the directory `out`; returns the report."""
    from compress_methods import recover
    from compress_methods.recipe.training import parse_training

    with tempfile.TemporaryDirectory() as folder:
        start = fresh(Path(folder) / "fresh")
        settings = parse_training({**TRAINING, **changes}, out.name)
        return recover(start, TEACHER, out, settings, device="cpu")


if __name__ == "__main__":
    print(make(Path(sys.argv[1]))["held_out"])

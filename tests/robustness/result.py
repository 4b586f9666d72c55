"""A model small enough to be converted in a part of a second, and its results."""

from __future__ import annotations

from pathlib import Path

from compress_methods import convert

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "novels-8m" / "tokenizer.json"
TEXT = "text.txt"
CALIBRATION = "calibration: {samples: 2, length: 32, held_out: 1}\n"
PACKING = """
formats: {w: {format: integer, bits: 4, group_size: 32}}
modules: [{match: blocks, format: w, algorithm: %s}]
"""
STAGES = """
stages:
  - {transform: depth, drop: 1}
  - formats: {w: {format: integer, bits: 4, group_size: 32}}
    modules: [{match: blocks, format: w, algorithm: {algorithm: gptq, sweeps: 0}}]
"""
RECIPES = {
    "rtn": PACKING % "rtn" + CALIBRATION,
    "gptq": PACKING % "gptq" + CALIBRATION,
    "stages": STAGES + CALIBRATION,
}


def tiny_model(folder: Path) -> Path:
    """A Llama with random weights, three blocks of 32 columns, and a text in its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / TEXT).write_bytes(LICENSE.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(TOKENIZER.with_name(name).read_bytes())
    return folder


def recipe(name: str, folder: Path) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPES[name])
    return path


def make(model: Path, recipe: Path, out: Path) -> None:
    """Convert, as a process of its own or not."""
    convert(model, recipe, out, calibration=model / TEXT, quiet=True)


def contents(out: Path) -> dict[str, bytes]:
    """All files that must not depend on when they were written."""
    timed = {"report.json", "README.md"}
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in timed}

"""Peak memory and rate of conversions of random Llamas and Mixtrals, each in a process of its own.

What `rtn`, `gptq`, `layers` and `experts` share.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.checkpoint.safetensors import Writer
from compress_methods.model.skeleton import Skeleton, build_skeleton
from compress_methods.model.slot import Slot
from compress_methods.recipe.matching import config_path

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER = REPOSITORY / "tests" / "assets" / "novels-8m"
THREE_B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
SMALL = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
VOCABULARY = 128256
DRAWN = 2**20 + 7  # odd, so that no rows of a matrix are the same


@dataclass(frozen=True)
class Case:
    """A random Llama, or a Mixtral where the shape has `num_local_experts`, and what is done to it,
    calibrated on text or on what it writes itself."""

    name: str
    shape: dict[str, int]
    recipe: Any
    shards: int = 1
    vocabulary: int = VOCABULARY
    text: bool = False


def make_llama(directory: Path, shape: dict[str, int], shards: int, vocabulary: int) -> int:
    """A random bf16 model on disk, written a tensor at a time; returns its bytes."""
    from transformers import LlamaConfig, MixtralConfig

    from compress_methods.formats import TensorSpec

    directory.mkdir()
    heads = shape["hidden_size"] // 64
    kind = "Mixtral" if "num_local_experts" in shape else "Llama"
    (MixtralConfig if kind == "Mixtral" else LlamaConfig)(
        **shape,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=[f"{kind}ForCausalLM"],
    ).save_pretrained(directory)
    names = list(_stored_shapes(build_skeleton(directory)).items())
    weight_map, total = {}, 0
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(names[len(names) * i // shards : len(names) * (i + 1) // shards])
        specs = {n: TensorSpec(tuple(size), "bfloat16") for n, size in mine.items()}
        with Writer(directory / file, specs) as writer:
            for name, spec in specs.items():
                values = _random(spec.shape) if len(spec.shape) > 1 else torch.ones(spec.shape)
                writer.put(name, values.bfloat16())
                weight_map[name] = file
                total += spec.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TOKENIZER / name).read_bytes())
    return total


def _random(shape: Sequence[int]) -> Tensor:
    """Normal numbers that repeat: to draw all of them takes as long as to convert them."""
    drawn = torch.empty(DRAWN, dtype=torch.bfloat16).normal_(0, 0.02)
    count = math.prod(shape)
    return drawn.repeat(-(-count // DRAWN))[:count].view(*shape)


def _stored_shapes(skeleton: Skeleton) -> dict[str, Sequence[int]]:
    """Names and shapes of the tensors on disk, experts one by one."""
    experts: dict[str, list[Slot]] = {
        s.parameter: [] for s in skeleton.slots.values() if s.kind == "experts"
    }
    for slot in skeleton.slots.values():
        if slot.parameter in experts:
            experts[slot.parameter].append(slot)
    found: dict[str, Sequence[int]] = {}
    for name, size in skeleton.parameter_names().items():
        if name in experts:
            found |= {f"{s.module}.weight": (s.rows, s.cols) for s in experts[name]}
        else:
            found[skeleton.stored_names.of(name)] = size
    return found


def convert_apart(model: Path, recipe: Any, out: Path, text: Path | None) -> dict[str, Any]:
    """Convert in a fresh process: seconds and peak resident bytes as the kernel counted them."""
    code = (
        "import json,sys; from compress_methods import convert; a=json.loads(sys.argv[1]); "
        "from compress_methods.system.memory import return_large_blocks as r; r(); "
        "convert(a[0], a[1], a[2], calibration=a[3], quiet=True)"
    )
    argument = json.dumps([str(model), recipe, str(out), None if text is None else str(text)])
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, argument], check=True)
    seconds = time.monotonic() - began
    run = json.loads((out / "report.json").read_text())["run"]
    return {"seconds": seconds, "peak_bytes": run["peak_memory_bytes"]}


def gptq(samples: int) -> dict[str, Any]:
    """The recipe `int4-gptq` with `samples` calibration sequences of 512 tokens, and 2 held out."""
    import yaml

    recipe: dict[str, Any] = yaml.safe_load(config_path("recipes", "int4-gptq.yaml").read_text())
    return {**recipe, "calibration": {"samples": samples, "length": 512, "held_out": 2}}


def measure(cases: list[Case]) -> dict[str, Any]:
    """Make each model, convert it in a process of its own, delete both."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            text = place / "text.txt"
            text.write_text((REPOSITORY / "LICENSE").read_text() * 4)
            size = make_llama(place / "model", case.shape, case.shards, case.vocabulary)
            measured = convert_apart(
                place / "model", case.recipe, place / "out", text if case.text else None
            )
        rows.append({"case": case.name, "bytes": size, **measured})
        print(rows[-1], file=sys.stderr, flush=True)
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    lines = ["| conversion | weights | peak memory | seconds | MB/s |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['case']} | {row['bytes'] / 1e9:.2f} GB | {row['peak_bytes'] / 2**30:.2f} GiB "
            f"| {row['seconds']:.0f} | {row['bytes'] / 1e6 / row['seconds']:.0f} |"
        )
    return "\n".join(lines)

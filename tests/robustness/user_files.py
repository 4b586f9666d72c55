"""Files that users write, and what reads each of them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import read_entries, read_json
from compress_methods.checkpoint.integrity import find_damaged, read_report, seal
from compress_methods.checkpoint.quantization_config import parse
from compress_methods.errors import CompressError
from compress_methods.recipe.stages import load_staged
from tests.robustness.mutations import mutations
from tests.robustness.outcomes import Outcome, Tally
from vllm_compress.metrics.checkpoint_summary import quantization_method
from vllm_compress.operations.capacity.calibration.fit import read_calibration
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.hardware import read_hardware
from vllm_compress.operations.capacity.throughput.trace import read_trace
from vllm_compress.operations.deployment_file import load_deployment
from vllm_compress.operations.teaching.overlap import read_held_out
from vllm_compress.operations.teaching.seeds import read_seeds

SLOWEST, LONGEST = 2.0, 2000
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS, MODEL = REPOSITORY / "configs", REPOSITORY / "tests" / "assets" / "novels-8m"
MODULES = [f"model.layers.{i}.mlp.down_proj" for i in range(30)] + ["lm_head", "a" * 60]
Read = Callable[[Path], Any]


def recipe(path: Path) -> None:
    staged = load_staged(path)
    for rule in staged.packing.modules if staged.packing else ():
        assert {type(rule.matches(module, "blocks")) for module in MODULES} == {bool}
    json.dumps(staged.to_dict())


def quantization(path: Path) -> None:
    spec = parse(read_json(path).get("quantization_config"), f"{path}: quantization_config")
    for module in MODULES:
        spec.format_for(module)


def index(path: Path) -> None:
    read_entries(path.parent)


def report(path: Path) -> None:
    find_damaged(path.parent)
    read_report(path.parent)


def shape(path: Path) -> None:
    load_shape(str(path.parent))
    quantization_method(path.parent)


def held_out(path: Path) -> None:
    read_held_out(path, 13)


def seeds_of(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CONFIGS / folder).glob("*.yaml"))]


def result() -> dict[str, Any]:
    block = {
        "quant_method": "vllm_compress",
        "version": 1,
        "formats": {"w4": {"format": "integer", "bits": 4, "group_size": 32, "symmetric": True}},
        "modules": [{"match": r"re:model\.layers\.\d+\.mlp\..*", "format": "w4", "shape": [8, 64]}],
        "tied": {"lm_head": "model.embed_tokens"},
        "embedding": "model.embed_tokens",
    }
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    return {"model_type": "llama", "vocab_size": 9, **sizes, "quantization_config": block}


def encoded(*blocks: dict[str, Any]) -> list[bytes]:
    return [json.dumps(block).encode() for block in blocks]


def seeds(name: str, folder: Path) -> list[bytes]:
    if name == "report.json":
        return encoded(seal({"fingerprint": "x", "modules": {"a": {"shape": [1, 2]}}}, folder))
    if name == "hardware.yaml":
        return [(CONFIGS / "hardware.yaml").read_bytes()[:3600].rpartition(b"\n\n")[0]]
    if name in ("recipe.yaml", "deployment.yaml"):
        return seeds_of({"recipe.yaml": "recipes", "deployment.yaml": "deployments"}[name])
    if name == "model.safetensors.index.json":
        return encoded({"weight_map": {"a.weight": "one.safetensors"}})
    return []


MEASURED = {
    **{"version": 1, "source": "x", "url": "http://x", "model": "x", "machine": {"key": "l4"}},
    **{"weight_bytes": 9, "tokens": [[1, 0.1], [2, 0.2]], "head": [[1, 0.1]], "per_context": 0.1},
    **{"per_pair": 0.1, "request_seconds": 0.1, "devices": 1, "kv_tokens": 9},
}
SEEDS: list[dict[str, Any]] = [
    {"prompt": "What is two plus two?", "answer": 4},
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]},
]
ANSWERED = [
    {"request_start_time": 1.5 * i, "prompt_tokens": 9, "output_tokens": 2} for i in range(20)
]
GUIDELLM = {"benchmarks": [{"requests": {"successful": ANSWERED}}]}
READERS: dict[str, tuple[str, Read, list[bytes]]] = {
    "recipe": ("recipe.yaml", recipe, []),
    "deployment": ("deployment.yaml", load_deployment, []),
    "hardware": ("hardware.yaml", read_hardware, []),
    "config": ("config.json", quantization, encoded(result())),
    "shape": ("config.json", shape, [(MODEL / "config.json").read_bytes()]),
    "index": ("model.safetensors.index.json", index, []),
    "report": ("report.json", report, []),
    "calibration": ("calibration.json", read_calibration, encoded(MEASURED)),
    "trace": ("trace.json", read_trace, encoded(GUIDELLM)),
    "seeds": ("seeds.jsonl", read_seeds, encoded(*SEEDS)),
    "held-out": ("held.jsonl", held_out, encoded(*SEEDS)),
}


def try_files(reader: str, inputs: int, folder: Path) -> Tally:
    """Every mutated file is a value or one line that names it, in time."""
    name, read, originals = READERS[reader]
    tally = Tally(f"`{name}`, read as {reader}")
    prepare(reader, folder)
    originals = originals or seeds(name, folder)
    path = folder / name
    for original in originals:
        path.write_bytes(original)
        read(path)
    for text in mutations(originals, path.suffix == ".yaml", random.Random(reader), inputs):
        path.write_bytes(text)
        began = time.monotonic()
        outcome, said = outcome_of(read, path)
        if time.monotonic() - began > SLOWEST:
            outcome, said = Outcome.CRASHED, "took too long"
        tally.add(outcome, f"{said} of {text[:300]!r}")
    return tally


def prepare(reader: str, folder: Path) -> None:
    """Write what the reader expects beside the file."""
    (folder / "other.txt").write_text("x")
    if reader == "shape":
        (folder / "model.safetensors").symlink_to(next(MODEL.glob("*.safetensors")))
    if reader == "index":
        import torch

        from compress_methods.checkpoint.safetensors import write_tensors

        write_tensors(folder / "one.safetensors", {"a.weight": torch.zeros(2)})


def outcome_of(read: Read, path: Path) -> tuple[Outcome, str]:
    try:
        read(path)
    except CompressError as problem:
        line = str(problem)
        clear = line.isprintable() and path.parent.name in line and len(line) < LONGEST
        return (Outcome.CLEAR if clear else Outcome.UNCLEAR), line
    except Exception as problem:
        return Outcome.CRASHED, f"{type(problem).__name__}: {problem}"
    return Outcome.VALUE, ""

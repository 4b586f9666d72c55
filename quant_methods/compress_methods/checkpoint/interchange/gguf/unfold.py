"""A GGUF file as a model directory: config.json and tokenizer made from its key-value pairs, the
tensors left where they are.

transformers reads both with the `gguf` package, and knows what each tensor is called in its model.
What it leaves out and would be a wrong answer is done or refused here: factors of rotary embeddings
(`rope_freqs`, of Llama 3.1) become the `rope_scaling` they come from, any other scaling of rotary
embeddings is refused. Where a directory has a config.json beside the file, that and its tokenizer
are taken.
"""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress_methods.checkpoint.interchange.gguf.container import (
    SUFFIX,
    Described,
    parts_of,
    read_gguf,
)
from compress_methods.checkpoint.interchange.gguf.entries import METHOD, entry_of, require_known
from compress_methods.errors import CheckpointError
from compress_methods.model.skeleton import build_skeleton, quiet_transformers
from compress_methods.system.user_file import read_json_value

ROTARY, LLAMA = "rope_freqs.weight", "llama"
RAISED_NORMS = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms are stored with 1 added."""
READ = (
    LLAMA, "qwen2", "qwen3", *RAISED_NORMS, "phi3", "stablelm", "starcoder2", "falcon",
    "cohere", "command-r",
)  # fmt: skip
"""Architectures whose tensors are those of transformers' models, but for the changes named here."""
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXT, FACTORS = 8192, (8.0, 32.0, 4.0, 16.0)


def find_gguf(directory: Path) -> Path | None:
    """The one model among the GGUF files of a directory; `CheckpointError` where there are more."""
    firsts = sorted({parts_of(path)[0] for path in directory.glob(f"*{SUFFIX}")})
    if len(firsts) > 1:
        raise CheckpointError(
            f"{directory}: has {len(firsts)} GGUF models ({firsts[0].name}, ...); name one of them"
        )
    return firsts[0] if firsts else None


def unfold(path: Path, beside: Path | None = None) -> Path:
    """A temporary directory, gone when the process ends, that opens as the model of a GGUF file;
    `beside` has a config.json to take. Raises `CheckpointError`."""
    files = parts_of(path)
    facts, tensors = read_gguf(files[0])
    for file in files[1:]:
        tensors |= read_gguf(file)[1]
    kind = str(facts.get("general.architecture"))
    if kind not in READ:
        raise CheckpointError(
            f"{path}: general.architecture is {kind!r}, expected one of {', '.join(READ)}"
        )
    folder = Path(tempfile.mkdtemp(prefix="vllm-compress-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if beside is None:
        _write_config(path, folder, facts, tensors)
        _write_tokenizer(path, folder)
    else:
        for file in beside.iterdir():
            if file.is_file() and file.suffix != SUFFIX:
                shutil.copyfile(file, folder / file.name)
    _add_block(files, folder, kind, tensors)
    return folder


def _transformers(path: Path, what: str, load: Any, folder: Path) -> None:
    """Have transformers make something of the file and save it."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{path}: reading it needs the package gguf (pip install 'vllm-compress[gguf]')"
        ) from None
    try:
        with quiet_transformers():
            load(path.parent, gguf_file=path.name).save_pretrained(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # tokenizers panics, which is no Exception
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise CheckpointError(f"{path}: transformers makes no {what} of it ({reason})") from problem


def _write_config(
    path: Path, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Described]
) -> None:
    import transformers

    _transformers(path, "config", transformers.AutoConfig.from_pretrained, folder)
    config = _read(folder)
    kind = facts["general.architecture"]
    scaling = str(facts.get(f"{kind}.rope.scaling.type", "none"))
    if scaling != "none":
        raise CheckpointError(
            f"{path}: scales rotary embeddings ({scaling!r}), which transformers does not take "
            "from the file; put the original's config.json beside it"
        )
    if ROTARY in tensors:
        config = _rotary(path, config, tensors[ROTARY])
    size = facts.get(f"{kind}.attention.key_length")
    if isinstance(size, int):  # transformers leaves it out for some, and takes its own default
        config["head_dim"] = size
    config.setdefault("dtype", "bfloat16")
    _write(folder, config)


def _write_tokenizer(path: Path, folder: Path) -> None:
    """A model can be converted without one, so it may be missing, with a word."""
    import transformers

    try:
        _transformers(path, "tokenizer", transformers.AutoTokenizer.from_pretrained, folder)
    except CheckpointError as problem:
        print(f"{problem}; go on without", file=sys.stderr, flush=True)


def _rotary(path: Path, config: dict[str, Any], found: Described) -> dict[str, Any]:
    """config.json with the `rope_scaling` that the stored factors come from."""
    factors = entry_of(ROTARY, found).read().float()
    rope = dict(config.get("rope_parameters") or {})
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    for factor in FACTORS:
        if torch.allclose(factors, llama3_factors(len(factors), base, factor), rtol=1e-3):
            scaling = {
                **LLAMA3,
                "factor": factor,
                "original_max_position_embeddings": CONTEXT,
                "rope_theta": base,
            }
            return {**config, "rope_parameters": {**rope, **scaling}}
    raise CheckpointError(
        f"{path}: {ROTARY} holds factors that no known rope_scaling gives; put the original's "
        "config.json beside it"
    )


def llama3_factors(count: int, base: float, factor: float) -> torch.Tensor:
    """What Llama 3.1 divides each frequency by."""
    places = torch.arange(0, 2 * count, 2, dtype=torch.float64) / (2 * count)
    waves = 2 * torch.pi * base**places
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = (CONTEXT / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(waves > CONTEXT / low, torch.full_like(waves, factor), between)
    return torch.where(waves < CONTEXT / high, torch.ones_like(waves), found).float()


def _add_block(
    files: list[Path], folder: Path, kind: str, tensors: Mapping[str, Described]
) -> None:
    """Say in config.json where the tensors are and what transformers calls them."""
    config = _read(folder)
    config.pop("quantization_config", None)
    _write(folder, config)
    model = build_skeleton(folder).model
    names = theirs_by_name(model)
    kept = {theirs: name for theirs, name in names.items() if theirs in tensors}
    require_known([t for t in tensors if t not in kept and t != ROTARY], files[0])
    changes: dict[str, dict[str, Any]] = {}
    for theirs in kept:
        if kind == LLAMA and (heads := turned_heads(theirs, config)):
            changes[theirs] = {"heads": heads}
        elif kind in RAISED_NORMS and theirs.endswith("norm.weight"):
            changes[theirs] = {"less": 1.0}
    block = {
        "quant_method": METHOD,
        "files": [str(file.resolve()) for file in files],
        "names": kept,
        "changes": changes,
    }
    config |= {"architectures": [type(model).__name__], "quantization_config": block}
    _write(folder, config)


def theirs_by_name(model: Any) -> dict[str, str]:
    """What transformers' model calls each tensor that GGUF has a name for, by that."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    kind = model.config.model_type
    alike = LLAMA if kind == "mistral" else None
    found: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor(), alike)
    return found


def turned_heads(theirs: str, config: Mapping[str, Any]) -> int:
    """Of a tensor of `llama` the heads whose rows are interleaved; 0 where none are."""
    heads = int(config["num_attention_heads"])
    if ".attn_q." in theirs:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".attn_k." in theirs else 0


def _read(folder: Path) -> dict[str, Any]:
    return dict(read_json_value(folder / "config.json", CheckpointError))


def _write(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

"""A tokenizer's place in a GGUF file: byte-level BPE, as GPT-2, Llama 3 and Qwen have it.

llama.cpp knows by name how text is cut into words before pairs are merged. The name is found here
by the pattern in tokenizer.json; a tokenizer with another one, or of another kind, is left out with
a word, since a wrong guess would only show in what a model says. Such a file has a model and no
vocabulary: llama.cpp computes with token numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError
from compress_methods.system.user_file import read_json_value

TOKENIZER = "tokenizer.json"
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {CUTS % "{1,3}": "llama-bpe", CUTS % "": "qwen2"}
"""Names by the pattern of a `Split`."""
GPT2 = "gpt-2"


def add_tokenizer(writer: Any, directory: Path, size: int) -> None:
    """Tell the writer of a file the vocabulary of `size` tokens in a model directory."""
    import gguf

    path = directory / TOKENIZER
    found = read_json_value(path, CheckpointError) if path.exists() else {}
    cut = _cut(found)
    if cut is None:
        print(
            f"{path}: no tokenizer that GGUF is known to have (byte-level BPE of GPT-2, Llama 3 or "
            "Qwen); the file gets none",
            file=sys.stderr,
            flush=True,
        )
        writer.add_tokenizer_model("none")
        return
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [kinds.UNUSED] * size
    for token, number in found["model"]["vocab"].items():
        tokens[number], types[number] = token, kinds.NORMAL
    for added in found.get("added_tokens", ()):
        number = added["id"]
        tokens[number] = added["content"]
        types[number] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


def _cut(found: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how text is cut into words; None where it has none that is known here.

    In a sequence of steps only a `Split` and bytes after it are known.
    """
    model, step = found.get("model") or {}, found.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    steps = step.get("pretokenizers", [step])
    kinds = [one.get("type") for one in steps]
    if any(one.get("add_prefix_space") for one in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return PATTERNS.get((steps[0].get("pattern") or {}).get("Regex", ""))
    return None

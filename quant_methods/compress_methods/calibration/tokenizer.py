"""A model's tokenizer and context, as far as texts depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import read_json
from compress_methods.errors import CalibrationError, CheckpointError


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory, which remembers how many tokens the model knows;
    raises `CheckpointError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:  # transformers and tokenizers raise many kinds here
        reason = " ".join(str(problem).split())[:200]
        if "custom code" in str(problem):
            reason = "it brings Python code of its own, which is never run"
        raise CheckpointError(f"{directory}: has no usable tokenizer ({reason})") from problem
    tokenizer.vocabulary_of_model = _text_config(directory).get("vocab_size")
    return tokenizer


def require_known(ids: Sequence[int], tokenizer: Any) -> None:
    """Raise `CheckpointError` where a text has tokens that the model has no embedding for."""
    known = getattr(tokenizer, "vocabulary_of_model", None)
    if isinstance(known, int) and ids and max(ids) >= known:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer gives token {max(ids)} "
            f"({tokenizer.convert_ids_to_tokens(max(ids))!r}), but its model knows {known} tokens"
        )


def leading_bos(tokenizer: Any) -> int | None:
    """The BOS (or CLS) token where the tokenizer itself puts it before a text, else None."""
    first = next(iter(tokenizer("a")["input_ids"]), None)
    starts = (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None))
    return first if first is not None and first in starts else None


def check_vocabulary(base: Any, other: Any, base_path: Path, path: Path) -> None:
    """Raise `CheckpointError` unless two tokenizers give every token the same id."""
    expected, found = base.get_vocab(), other.get_vocab()
    different = sum(found.get(token) != i for token, i in expected.items())
    different += len(found.keys() - expected.keys())
    if different:
        raise CheckpointError(
            f"{path}: {different} of {len(found)} tokens differ from those of {base_path}; "
            "expected the same tokenizer"
        )


def check_length(directory: Path, length: int) -> None:
    """Raise `CalibrationError` where windows of `length` are longer than the model's context."""
    positions = context_length(directory)
    if positions is not None and length > positions:
        raise CalibrationError(
            f"length is {length}, but {directory.name} takes {positions} tokens; give fewer"
        )


def context_length(directory: Path) -> int | None:
    """The tokens a model takes, where its config.json says."""
    config = _text_config(directory)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None


def _text_config(directory: Path) -> dict[str, Any]:
    """What config.json says of the language model, which may be one of several parts."""
    config = read_json(directory / "config.json")
    found: dict[str, Any] = config.get("text_config") or config
    return found

"""Which token's state, or what mean, stands for a text: the pooling of an embedding model.

sentence-transformers writes it beside the weights (`modules.json` names the folder, its config.json
has `pooling_mode_*`). Where nothing does, encoders take the first token and causal models the last,
as vLLM does. Weighted means and concatenations are refused: vLLM serves none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.checkpoint.compressed import read_json
from compress_methods.errors import CheckpointError
from compress_methods.model.architecture import Architecture
from compress_methods.system.user_file import read_json_value

FIRST, LAST, MEAN = "first", "last", "mean"
MODULES = "modules.json"
MODES = {
    "pooling_mode_cls_token": FIRST,
    "pooling_mode_lasttoken": LAST,
    "pooling_mode_mean_tokens": MEAN,
}


def pooling_of(directory: Path, architecture: Architecture) -> str:
    """`first`, `last` or `mean`; `CheckpointError` where the model asks for something else."""
    usual = FIRST if architecture.only_blocks else LAST
    path = directory / MODULES
    if not path.is_file():
        return usual
    folder = next((_folder(each) for each in _modules(path) if "Pooling" in str(each)), None)
    if folder is None or not (directory / folder / "config.json").is_file():
        return usual
    config = read_json(directory / folder / "config.json")
    asked = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(asked) != 1 or asked[0] not in MODES:
        raise CheckpointError(
            f"{directory / folder / 'config.json'}: pooling is {', '.join(asked) or 'none'}, "
            f"expected one of {', '.join(MODES)}"
        )
    return MODES[asked[0]]


def _modules(path: Path) -> list[Any]:
    found = read_json_value(path, CheckpointError)
    return found if isinstance(found, list) else []


def _folder(module: Any) -> str | None:
    path = module.get("path") if isinstance(module, dict) else None
    return path if isinstance(path, str) else None


def pooled(states: Tensor, pooling: str) -> Tensor:
    """The vector [hidden] of a text from its last hidden states [length, hidden]."""
    if pooling == MEAN:
        return states.mean(0)
    return states[0 if pooling == FIRST else -1]

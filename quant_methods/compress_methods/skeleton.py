"""The model without its weights: modules, names and the order things run in.

Built by transformers from config.json with every parameter on the meta device, so it costs
megabytes for any model. Everything is found by structure, not by family: the decoder blocks are the
`nn.ModuleList` that holds most parameters, compressible modules are `nn.Linear`, GPT-2's `Conv1D`
(stored [inputs, outputs]) and the token table. Fails for models whose checkpoint tensors are not
named after transformers' modules (experts that transformers fuses on load are then kept dense).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_methods.conversion.names import ROUTERS
from compress_methods.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """One compressible matrix: [rows, cols] = [outputs, inputs], tokens first for embeddings."""

    module: str
    kind: str
    rows: int
    cols: int
    transposed: bool = False


class Skeleton:
    """A causal LM on the meta device and what its parts are called."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks_name, self.blocks = _find_blocks(model)
        modules = {module: name for name, module in model.named_modules()}
        self.embedding = modules[model.get_input_embeddings()]
        head = model.get_output_embeddings()
        self.head = modules.get(head, "") if head is not None else ""
        self.tied = self._tied()
        self.targets = {t.module: t for t in self._find_targets()}

    def _tied(self) -> dict[str, str]:
        head, table = self.module(self.head), self.module(self.embedding)
        if self.head and getattr(head, "weight", None) is getattr(table, "weight", 0):
            return {self.head: self.embedding}
        return {}

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def kind(self, name: str) -> str:
        """`blocks`, `embedding`, `lm_head` or empty: what a recipe's `match` may call a module."""
        if name == self.embedding:
            return "embedding"
        if name == self.head:
            return "lm_head"
        in_blocks = name.startswith(f"{self.blocks_name}.")
        return "blocks" if in_blocks and name.rpartition(".")[2] not in ROUTERS else ""

    def _find_targets(self) -> Iterator[Target]:
        from transformers.pytorch_utils import Conv1D

        for name, module in self.model.named_modules():
            if name in self.tied:
                continue
            if isinstance(module, Conv1D):
                cols, rows = module.weight.shape
                yield Target(name, self.kind(name), rows, cols, transposed=True)
            elif isinstance(module, nn.Linear) or name == self.embedding:
                rows, cols = module.weight.shape
                yield Target(name, self.kind(name), rows, cols)

    def block_of(self, name: str) -> int | None:
        """Index of the block that a module or tensor name belongs to."""
        prefix = f"{self.blocks_name}."
        if not name.startswith(prefix):
            return None
        return int(name[len(prefix) :].partition(".")[0])

    def parameter_names(self) -> dict[str, torch.Size]:
        """Name and shape of every parameter and saved buffer; tied ones under their owner only."""
        names = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}
        names |= {n: b.shape for n, b in self.model.state_dict().items() if n not in names}
        for alias in self.tied:
            names.pop(f"{alias}.weight", None)
        return names


def build_skeleton(directory: Path) -> Skeleton:
    """Skeleton from a checkpoint directory's config.json; raises `CheckpointError`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with _meta_parameters(), _quiet():
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers cannot build a causal LM from it ({reason})"
        ) from problem
    model.tie_weights()  # skipped while weights are not initialised
    model.eval()
    model.config.use_cache = False
    return Skeleton(model)


def checkpoint_names(skeleton: Skeleton, found: Mapping[str, Any]) -> dict[str, str]:
    """Parameter name -> checkpoint tensor name, allowing for a missing or extra base prefix.

    Parameters that the checkpoint doesn't hold under any such name are left out.
    """
    prefix = f"{skeleton.model.base_model_prefix}."
    names = {}
    for name in skeleton.parameter_names():
        variants = (name, name.removeprefix(prefix), prefix + name)
        match = next((v for v in variants if v in found), None)
        if match is not None:
            names[name] = match
    return names


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise CheckpointError(f"{type(model).__name__}: found no list of decoder blocks")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


@contextlib.contextmanager
def _meta_parameters() -> Iterator[None]:
    """Parameters registered inside land on the meta device; buffers (rotary tables) stay real."""
    from transformers.initialization import no_init_weights

    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own notices while a model is built."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

"""The model without its weights: modules, names and the order things run in.

Built by transformers from config.json with every parameter on the meta device, so it costs
megabytes for any model. What structure cannot tell, a row of `architecture.py` does: the blocks are
the `nn.ModuleList` that holds most parameters, compressible matrices are those of `nn.Linear`,
GPT-2's `Conv1D` (stored [inputs, outputs]), the token table and the fused parameters of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_methods.errors import CheckpointError
from compress_methods.model.architecture import Architecture, architecture_of
from compress_methods.model.relayout import relaid, relayout_of, set_activation
from compress_methods.model.slot import Index, Slot
from compress_methods.model.stored_names import EXPERT, StoredNames
from compress_methods.model.task import STATES

MOST_LAYERS = 10_000


class Skeleton:
    """A model on the meta device and what its parts are called."""

    def __init__(self, model: Any, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture = architecture or architecture_of(model.config)
        self.stored_names = StoredNames(model)
        self.tower = self._language_tower()
        self.blocks_name, self.blocks = self._find_blocks()
        modules = {module: name for name, module in model.named_modules()}
        self.embedding = modules[model.get_input_embeddings()]
        self.head = self._find_head(modules)
        self.tied = self._tied()
        self.duplicates = self._find_duplicates()
        self.slots = {slot.module: slot for slot in self._find_slots()}

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        named = self.architecture.blocks
        if named is not None:
            return named, self.model.get_submodule(named)
        found = self.model.named_modules()
        lists = [(n, m) for n, m in found if isinstance(m, nn.ModuleList) and len(m)]
        lists = [(n, m) for n, m in lists if f"{n}.".startswith(self.tower)]
        if not lists:
            raise CheckpointError(f"{type(self.model).__name__}: found no list of blocks")
        return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))

    def _language_tower(self) -> str:
        """How names in the language model begin, where a vision tower stands beside it."""
        if getattr(self.model.config, "vision_config", None) is None:
            return ""
        tower = self.model.get_decoder()
        return next(f"{name}." for name, module in self.model.named_modules() if module is tower)

    def _find_head(self, modules: Mapping[nn.Module, str]) -> str:
        if self.architecture.head is not None:
            return self.architecture.head
        head = self.model.get_output_embeddings()
        return modules.get(head, "") if head is not None else ""

    def _tied(self) -> dict[str, str]:
        head, table = self.module(self.head), self.module(self.embedding)
        if self.head and getattr(head, "weight", None) is getattr(table, "weight", 0):
            return {self.head: self.embedding}
        return {}

    def _find_duplicates(self) -> dict[str, str]:
        """Other names of parameters that the model has twice, with the first; a tied head apart."""
        first: dict[int, str] = {}
        heads = {f"{alias}.weight" for alias in self.tied}
        found = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(parameter), name)
            if owner != name and name not in heads:
                found[name] = owner
        return found

    @property
    def gives_states(self) -> bool:
        """Whether the model has no head: it ends in hidden states."""
        return self.architecture.loss == STATES

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def kind(self, name: str) -> str:
        """`blocks`, `embedding`, `lm_head` or empty: what a recipe's `match` may call a module."""
        if name == self.embedding:
            return "embedding"
        if name == self.head:
            return "lm_head"
        in_blocks = name.startswith(f"{self.blocks_name}.")
        router = name.rpartition(".")[2] in self.architecture.routers
        return "blocks" if in_blocks and not router else ""

    def _find_slots(self) -> Iterator[Slot]:
        from transformers.pytorch_utils import Conv1D

        for name, module in self.model.named_modules():
            if name in self.tied:
                continue
            parameter = f"{name}.weight"
            if isinstance(module, Conv1D):
                cols, rows = module.weight.shape
                yield Slot(name, parameter, self.kind(name), rows, cols, transposed=True)
            elif isinstance(module, nn.Linear) or name == self.embedding:
                rows, cols = module.weight.shape
                yield Slot(name, parameter, self.kind(name), rows, cols)
            else:
                yield from self._expert_slots(name, module)

    def _expert_slots(self, name: str, module: nn.Module) -> Iterator[Slot]:
        """The matrices in parameters [experts, rows, cols], expert by expert."""
        for leaf, parts in self.architecture.experts.items():
            parameter = module._parameters.get(leaf)
            if parameter is None or parameter.dim() != 3:
                continue
            transposed = self.architecture.transposes(module)
            count, *size = parameter.shape
            outputs, inputs = reversed(size) if transposed else size
            stored = self.stored_names.matrices(f"{name}.{leaf}")
            modules = stored or [f"{name}.{EXPERT}.{part}" for part in parts]
            ranges = _row_ranges(outputs, len(parts), getattr(module, "is_concatenated", True))
            for expert in range(count):
                for each, taken in zip(modules, ranges, strict=True):
                    index: Index = (
                        expert,
                        *([(0, inputs)] if transposed and taken else []),
                        *taken,
                    )
                    yield Slot(
                        each.replace(EXPERT, str(expert)),
                        f"{name}.{leaf}",
                        "experts",
                        outputs // len(parts),
                        inputs,
                        transposed=transposed,
                        index=index,
                    )

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
        for alias in (*(f"{head}.weight" for head in self.tied), *self.duplicates):
            names.pop(alias, None)
        return names


def _row_ranges(rows: int, parts: int, concatenated: bool) -> list[Index]:
    """Which rows each of the matrices in one has: one below the other, or by turns."""
    if parts == 1:
        return [()]
    if not concatenated:
        return [((i, rows, parts),) for i in range(parts)]
    size = rows // parts
    return [((i * size, (i + 1) * size),) for i in range(parts)]


def build_skeleton(directory: Path, tied: bool | None = None) -> Skeleton:
    """Skeleton from a checkpoint directory's config.json; raises `CheckpointError`.

    `tied` overrules what the config says of embedding and head.
    """
    import transformers

    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        values, _ = transformers.PreTrainedConfig.get_config_dict(directory, **local)
        if relayout_of(values) is not None:
            config = transformers.AutoConfig.for_model(**relaid(values))
        else:
            config = transformers.AutoConfig.from_pretrained(directory, **local)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if tied is not None:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:  # or it would build them for hours
            raise ValueError(f"num_hidden_layers is {layers:,}, expected at most {MOST_LAYERS:,}")
        architecture = architecture_of(config)
        options: dict[str, Any] = {"trust_remote_code": False}
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # torch's attention, which transformers takes where it can, leaves the cap out.
            options["attn_implementation"] = "eager"
        with _meta_parameters(), quiet_transformers():
            model = getattr(transformers, architecture.auto_class).from_config(config, **options)
    except AssertionError:
        raise  # not of the config: who serves has put code of its own into transformers' classes
    except Exception as problem:  # transformers and its strict configs raise many kinds here
        reason = " ".join(str(problem).split())[:300]
        if "custom code" in str(problem):
            reason = "it brings Python code of its own, which is never run"
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers cannot build a model from it ({reason})"
        ) from problem
    model.tie_weights()  # skipped while weights are not initialised
    set_activation(model)
    model.eval()
    model.config.use_cache = False
    return Skeleton(model, architecture)


def checkpoint_names(skeleton: Skeleton, found: Mapping[str, Any]) -> dict[str, str]:
    """Parameter name -> checkpoint tensor name, allowing for a missing or extra base prefix.

    Parameters that the checkpoint doesn't hold under any such name are left out.
    """
    names = {}
    for name in skeleton.parameter_names():
        stored = skeleton.stored_names.of(name)
        variants = (*name_variants(skeleton, name), *name_variants(skeleton, stored))
        match = next((v for v in variants if v in found), None)
        if match is not None:
            names[name] = match
    return names


def name_variants(skeleton: Skeleton, name: str) -> tuple[str, ...]:
    """A name without the base model's prefix, with it, and with one that transformers drops."""
    prefix = f"{skeleton.model.base_model_prefix}."
    bare = name.removeprefix(prefix)
    return name, bare, prefix + name, *(each + bare for each in skeleton.stored_names.prefixes)


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a (meta) parameter or buffer by a real tensor of the same shape."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    if old.shape != tensor.shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(old.shape)}")
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


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
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own notices, of a model that is built or trained."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

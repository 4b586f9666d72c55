"""A checkpoint as a model whose stored numbers gradients can move.

The model computes at every step with exactly the values that would be stored: a float is rounded to
its stored dtype, a code to a whole number, and gradients pass as if nothing was rounded (the
straight-through estimator, Bengio et al., 2013, arXiv:1308.3432). So what is written at the end is
what was trained, to the last bit.

    scales   floats among the tensors of packed matrices (scales, cores, factors), biases and norms;
             codes stay. PEQA, Kim et al., 2023, arXiv:2305.14152
    distill  every float the checkpoint holds, token table and head among them; `sft` the same
    qat      the same as `scales`, and the codes of formats that `relax` can take: LLM-QAT (Liu et
             al., 2023, arXiv:2305.17888), started from the codes there are. A scale's gradient is
             that of LSQ (Esser et al., 2019, arXiv:1902.08153) for a code that stays

With `lora` of a rank r nothing of that moves. To each matrix W of the blocks of a plain checkpoint
A B is added, A [rows, r] and B [r, cols], which alone are trained (LoRA, Hu et al., 2021,
arXiv:2106.09685): Adam then has moments of r (rows + cols) values. What is written is the sum, as W
is stored. Matrices in the format `lowrank` have such factors, which then are trained.

A parameter is measured in its own size (the root mean square of its tensor), so that one learning
rate fits all. Zero points and lookup tables, which are stored as whole numbers, stay; so do floats
of 8 bits, the masks of sparse matrices, and the zeros of a plain matrix that has 5% or more.

Needs memory for all values in float32, their gradients, and of what is trained four times as much.
Fails where: nothing that can be trained is stored. Codes of 2 bits take long: a step from one to
the next is as large as a value, so at high rates noise turns more of them than gradients do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.checkpoint.compressed import CompressedCheckpoint, open_compressed
from compress_methods.checkpoint.loading.model import is_compressed, load_model
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.errors import RecipeError
from compress_methods.formats import torch_dtype
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.recipe.training import DISTILL, QAT, SCALES
from compress_methods.training.pieces import Adapted, Coded, Floats, Leaves, Packed, Piece
from compress_methods.training.recompute import recompute_blocks

MATRIX_DIMENSIONS = 2


class Part(nn.Module):
    """Pieces whose values are computed together; its parameters are what they train."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self.pieces = list(pieces)
        leaves = (leaf for piece in self.pieces for leaf in piece.leaves.values())
        self.trained = nn.ParameterList(nn.Parameter(leaf.clone()) for leaf in leaves)

    def paired(self) -> Iterator[tuple[Piece, Leaves]]:
        """The pieces with their parameters."""
        parameters = iter(self.trained)
        for piece in self.pieces:
            yield piece, {name: next(parameters) for name in piece.leaves}

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's parameters, as they come from what is trained."""
        found: dict[str, Tensor] = {}
        for piece, leaves in self.paired():
            value = piece.value(leaves)
            for slot in piece.slots:
                if isinstance(slot, str):
                    found[slot] = value
                elif not slot.index:
                    found[slot.parameter] = value.T if slot.transposed else value
                else:
                    name = slot.parameter
                    whole = found.setdefault(name, model.get_parameter(name).clone())
                    slot.of(whole).copy_(value)
        return found


class Student(nn.Module):
    """The model of a directory; its parameters are what `method` trains, or with `rank` adapters
    that start from `seed`. `teacher`: whose matrices it was made of."""

    def __init__(
        self,
        directory: Path,
        method: str,
        device: torch.device,
        teacher: Source | None = None,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Not a submodule: what is trained lies beside it, and nothing else is saved.
        self._model = (load_model(directory, torch.float32, device),)
        self.blocks_name = open_skeleton(directory).blocks_name
        if rank:
            pieces = list(_adapters(directory, rank, seed, device))
        else:
            pieces = list(_pieces(directory, method, device, teacher))
        if not any(piece.leaves for piece in pieces):
            raise RecipeError(f"{directory}: holds nothing that {method} could train")
        self.parts = nn.ModuleList(self._parted(pieces))
        self.beside = nn.ParameterList()
        """What is trained along and is no part of the checkpoint."""

    @property
    def model(self) -> Any:
        return self._model[0]

    def _parted(self, pieces: Sequence[Piece]) -> Iterable[Part]:
        """Where parameters lie."""
        return [Part(pieces)]

    def each(self) -> Iterator[Part]:
        """The parts, in order."""
        for part in self.parts:
            assert isinstance(part, Part)
            yield part

    @property
    def pieces(self) -> list[Piece]:
        """What of the checkpoint is trained."""
        return [piece for part in self.each() for piece in part.pieces]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters of the pieces, one after another."""
        return [parameter for part in self.each() for parameter in part.trained]

    def recompute(self) -> None:
        """Keep less for the way back, and compute it again."""
        recompute_blocks(self.model.get_submodule(self.blocks_name))

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The parameters with their learning rates, as torch's optimizers take them."""
        parameters, by_rate = iter(self.trained), dict[float, list[Tensor]]()
        for piece in self.pieces:
            for name in piece.leaves:
                by_rate.setdefault(piece.rates.get(name, 1.0), []).append(next(parameters))
        by_rate.setdefault(1.0, []).extend(self.beside)
        return [{"params": found, "lr": rate * own} for own, found in by_rate.items()]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab]."""
        logits: Tensor = self.run(self.values(), input_ids=input_ids, use_cache=False).logits
        return logits

    def run(self, values: dict[str, Tensor], **arguments: Any) -> Any:
        """What the model returns for arguments of its own, computed with such parameters."""
        return torch.func.functional_call(self.model, values, args=(), kwargs=arguments)

    @torch.no_grad()
    def limit(self) -> None:
        """Bring parameters back to where what is stored reaches."""
        for piece, leaves in self.paired():
            piece.limit(leaves)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint that training changes, as it is to be written."""
        found = [piece.stored(leaves) for piece, leaves in self.paired()]
        return {name: t.cpu().contiguous() for tensors in found for name, t in tensors.items()}

    def paired(self) -> Iterator[tuple[Piece, Leaves]]:
        """The pieces with their parameters."""
        for part in self.each():
            yield from part.paired()

    def values(self) -> dict[str, Tensor]:
        """The model's parameters, as they come from what is trained."""
        return {name: t for part in self.each() for name, t in part.values(self.model).items()}


def _pieces(
    directory: Path, method: str, device: torch.device, teacher: Source | None
) -> Iterator[Piece]:
    skeleton = open_skeleton(directory)
    source = open_source(directory, skeleton, directory.name, allow_pickle=False)
    checkpoint = open_compressed(directory) if is_compressed(directory) else None
    packed: set[str] = set()
    if checkpoint is not None:
        for module, matrix in checkpoint.matrices.items():
            slots = _slots(skeleton, checkpoint, module)
            packed |= {slot.parameter for slot in slots}
            if method == QAT and matrix.format.relaxes:
                yield Coded(matrix, slots, device, _original(skeleton, teacher, module))
            else:
                yield Packed(matrix, slots, device)
    yield from _floats(skeleton, source, packed, method, device)


def check_adapters(directory: Path, rank: int) -> None:
    """`RecipeError` where adapters of that rank could not become part of a checkpoint."""
    if not is_compressed(directory):
        return
    for module, matrix in open_compressed(directory).matrices.items():
        fmt = matrix.format
        if not isinstance(fmt, LowRank):
            raise RecipeError(
                f"{directory}: {module} is packed as {fmt.name}, which no adapter can be merged "
                "into; train without lora, or before packing"
            )
        if fmt.rank != rank:
            raise RecipeError(
                f"{directory}: {module} has factors of rank {fmt.rank}, expected lora {fmt.rank}, "
                f"found {rank}"
            )


def _adapters(directory: Path, rank: int, seed: int, device: torch.device) -> Iterator[Piece]:
    """Factors of `lowrank` matrices of a packed checkpoint, adapters of a plain one's blocks."""
    check_adapters(directory, rank)
    skeleton = open_skeleton(directory)
    if is_compressed(directory):
        checkpoint = open_compressed(directory)
        for module, matrix in checkpoint.matrices.items():
            fmt, slots = matrix.format, _slots(skeleton, checkpoint, module)
            assert isinstance(fmt, LowRank)
            shape = matrix.rows, matrix.cols
            still = () if fmt.base is None else fmt.base.tensors(*shape)
            yield Packed(matrix, slots, device, still)
        return
    source = open_source(directory, skeleton, directory.name, allow_pickle=False)
    generator = torch.Generator().manual_seed(seed)
    for floats in _floats(skeleton, source, set(), DISTILL, device):
        (slot,) = floats.slots
        name = slot if isinstance(slot, str) else slot.parameter
        inside = skeleton.block_of(name) is not None
        if inside and len(floats.entry.shape) >= MATRIX_DIMENSIONS:
            yield Adapted(floats.entry, slot, device, rank, generator)


def _original(skeleton: Skeleton, teacher: Source | None, module: str) -> Tensor | None:
    """The teacher's matrix of that name and shape."""
    slot = skeleton.slots.get(module)
    if slot is None or teacher is None:
        return None
    if slot.parameter not in teacher.names and slot.parameter not in teacher.parts:
        return None
    found = teacher.read_slot(slot)
    return found if found.shape == (slot.rows, slot.cols) else None


def _slots(skeleton: Skeleton, checkpoint: CompressedCheckpoint, module: str) -> list[Slot]:
    """Where a packed matrix goes: its own place, and those of modules that share it."""
    shared = (alias for alias, owner in checkpoint.shared.items() if owner == module)
    return [skeleton.slots[name] for name in (module, *shared) if name in skeleton.slots]


def _floats(
    skeleton: Skeleton, source: Source, packed: set[str], method: str, device: torch.device
) -> Iterator[Floats]:
    """What is kept as floats and trained: matrices only where everything is."""
    known = dict(skeleton.model.named_parameters())
    for name, shape in skeleton.parameter_names().items():
        if name in packed or name not in known:
            continue
        if len(shape) >= MATRIX_DIMENSIONS and method in (SCALES, QAT):
            continue
        places: list[Slot | str] = [name]
        if name in source.parts:
            places = list(source.parts[name].slots)
        for place in places:
            tensor = source.names[name] if isinstance(place, str) else source.tensor_of(place)
            entry = source.entries[tensor]
            if torch_dtype(entry.dtype).is_floating_point:
                yield Floats(entry, place, device)

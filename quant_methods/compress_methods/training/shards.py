"""Trainings with `shard`: each of several processes holds a share of what is trained.

    torchrun --nproc-per-node 4 -m vllm_compress.cli recover DIR --teacher MODEL -o OUT --shard ...

Parameters, their gradients and the optimizer's moments are divided among the processes, as are the
blocks of the teacher (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054; torch's `fully_shard`). The
parameters of a block come together when it is its turn; its values are computed then, and again on
the way back (as with `gradient_checkpointing`), so a process has those of one block at a time. A
step is that of one process with the whole batch.

Whole in each process: what surrounds the blocks of both models, codes and masks, and what does not
move at all. A checkpoint of a training has a file of each process, and belongs to so many of them.
Models are read one process after the other, into main memory.

Fails where: the teacher is to write the text, or GPUs have no room for one block beside the shares;
`qat`, `match` and `on_policy` are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.conversion.running import Running
from compress_methods.training.pieces import Leaves, Piece
from compress_methods.training.recompute import OwnForward
from compress_methods.training.student import Part, Student

CPU = torch.device("cpu")


@cache
def _mesh(kind: str, count: int) -> DeviceMesh:
    return init_device_mesh(kind, (count,))


def _divide(module: nn.Module, running: Running) -> None:
    """Leave this process its share of a module's parameters, outside of its forward."""
    mesh = _mesh(running.device.type, running.processes.count)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def load_divided(directory: Path, running: Running) -> Any:
    """A model to measure with, as `load_model` gives it, its blocks divided. All processes have to
    call it, and the model, together."""
    with running.processes.one_by_one():
        model = load_model(directory, torch.float32, CPU).requires_grad_(False)
        for block in model.get_submodule(open_skeleton(directory).blocks_name):
            _divide(block, running)
        return model.to(running.device)


class _Held(Part):
    """With what does not move among the parameters, too, so that it can be divided."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(pieces)
        # One number alone has no rows to divide.
        flat = (nn.Parameter(one if one.dim() else one.reshape(1)) for one in self.trained)
        self.trained = nn.ParameterList(flat)
        still = (tensor for piece in self.pieces for tensor in piece.still.values())
        self.still = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in still)

    def paired(self) -> Iterator[tuple[Piece, Leaves]]:
        still = iter(self.still)
        for piece, leaves in super().paired():
            held = {n: t if piece.leaves[n].dim() else t.view(()) for n, t in leaves.items()}
            yield piece, held | {name: next(still) for name in piece.still}

    def gathered(self) -> Iterator[tuple[Piece, Leaves]]:
        """The pieces with whole tensors, one after another; all processes have to ask for them."""
        still = iter(self.still)
        for piece, leaves in super().paired():
            tensors = {**leaves, **{name: next(still) for name in piece.still}}
            found = {
                n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()
            }
            shapes = {n: t.shape for n, t in (*piece.leaves.items(), *piece.still.items())}
            yield piece, {n: t.view(shapes[n]) for n, t in found.items()}


class _Block(_Held):
    """A block of the model that makes its own values, of parameters that come together for it."""

    def replace(self, model: nn.Module, name: str) -> None:
        """Compute what the block `name` does."""
        block = model.get_submodule(name)
        # Not submodules: what they hold is replaced.
        self._model, self._inner = (model,), (OwnForward(block),)
        self._place = f"{name}."
        block.forward = partial(_call, self)

    def forward(self, *args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*args, **given)
        return checkpoint(self._run, *args, use_reentrant=False, **given)

    def _run(self, *args: Any, **given: Any) -> Any:
        values = self.values(self._model[0])
        inside = {f"block.{name.removeprefix(self._place)}": t for name, t in values.items()}
        return torch.func.functional_call(self._inner[0], inside, args, given)


class DividedStudent(Student):
    """A student of which this process holds a share, once `divide` was called."""

    def __init__(
        self, directory: Path, method: str, running: Running, rank: int = 0, seed: int = 0
    ) -> None:
        self.running = running
        super().__init__(directory, method, CPU, None, rank, seed)
        for piece in self.pieces:
            piece.hand_over(running.device)
        self._let_go()
        self.model.to(running.device)
        *blocks, _ = self.each()
        for number, block in enumerate(blocks):
            assert isinstance(block, _Block)
            block.replace(self.model, f"{self.blocks_name}.{number}")
            _divide(block, running)

    def _parted(self, pieces: Sequence[Piece]) -> Iterable[Part]:
        """By block, those of none or of several last."""
        count = len(self.model.get_submodule(self.blocks_name))
        places: list[list[Piece]] = [[] for _ in range(count + 1)]
        for piece in pieces:
            names = [one if isinstance(one, str) else one.parameter for one in piece.slots]
            found = {_number(name, self.blocks_name, count) for name in names}
            places[found.pop() if len(found) == 1 else count].append(piece)
        *blocks, around = places
        return [*map(_Block, blocks), _Held(around)]

    def _let_go(self) -> None:
        """Free the loaded values that others take the place of."""
        filled = dict[str, int]()
        for piece in self.pieces:
            for slot in piece.slots:
                if isinstance(slot, str) or not slot.index:
                    name = slot if isinstance(slot, str) else slot.parameter
                    filled[name] = self.model.get_parameter(name).numel()
                else:
                    size = slot.rows * slot.cols
                    filled[slot.parameter] = filled.get(slot.parameter, 0) + size
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if filled.get(name) == parameter.numel():
                one = parameter.new_zeros((), device=self.running.device)
                parameter.data = one.expand(parameter.shape)

    def values(self) -> dict[str, Tensor]:
        """Those that surround the blocks, which make their own."""
        *_, around = self.each()
        return around.values(self.model)

    def limit(self) -> None:
        """Nothing that is divided has limits."""

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As any student's, in the first process; nothing in the others, which have to call it."""
        found: dict[str, Tensor] = {}
        for part in self.each():
            assert isinstance(part, _Held)
            for piece, leaves in part.gathered():
                if self.running.processes.leads:
                    tensors = piece.stored(leaves)
                    found |= {name: t.cpu().contiguous() for name, t in tensors.items()}
        return found


def _call(block: nn.Module, *args: Any, **given: Any) -> Any:
    return block(*args, **given)


def _number(name: str, blocks: str, count: int) -> int:
    """Which block a parameter is of; `count` where of none."""
    if not name.startswith(f"{blocks}."):
        return count
    return int(name.removeprefix(f"{blocks}.").partition(".")[0])


def divide_rest(lesson: nn.Module, running: Running) -> None:
    """Divide what no block has: of the module that all are called by, the blocks being divided."""
    _divide(lesson, running)


def save_model(lesson: nn.Module, folder: Path, rank: int) -> None:
    """This process's share of what is trained, in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([_local(one).clone() for one in _moving(lesson)], _file(folder, "model", rank))


def load_model_share(lesson: nn.Module, folder: Path, rank: int) -> None:
    """What `save_model` saved."""
    saved = torch.load(_file(folder, "model", rank), weights_only=True, map_location="cpu")
    with torch.no_grad():
        for parameter, tensor in zip(_moving(lesson), saved, strict=True):
            _local(parameter).copy_(tensor)


def save_optimizer(optimizer: Any, folder: Path, rank: int) -> None:
    """This process's share of an optimizer's state."""
    whole = optimizer.state_dict()
    state = {
        number: {key: _local(t).clone() for key, t in held.items()}
        for number, held in whole["state"].items()
    }
    torch.save({**whole, "state": state}, _file(folder, "optimizer", rank))


def load_optimizer(optimizer: Any, folder: Path, rank: int) -> None:
    """What `save_optimizer` saved."""
    saved = torch.load(_file(folder, "optimizer", rank), weights_only=True, map_location="cpu")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for number, held in saved["state"].items():
        held |= {key: _as_divided(t, parameters[number]) for key, t in held.items()}
    optimizer.load_state_dict(saved)


def _moving(lesson: nn.Module) -> list[nn.Parameter]:
    return [one for one in lesson.parameters() if one.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_divided(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A share of a moment as the share of its parameter is; the count of steps as it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.to_local().shape:
        return tensor
    return DTensor.from_local(
        tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _file(folder: Path, what: str, rank: int) -> Path:
    return folder / f"{what}-{rank}.pt"

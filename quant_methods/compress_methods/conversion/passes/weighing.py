"""weighing: how much every token counts in a matrix, by what its outputs there do to the loss.

GuidedQuant (Kim et al., 2025, arXiv:2505.07004): with y_t = W x_t of token t and a loss L, the loss
grows by about half of sum_t sum_i E[(dL/dy_ti)^2] (dw_i x_t)^2 when the rows w_i move by dw_i. Rows
in G groups of neighbours share the mean of the squares over their group, so each group g has a
Hessian of its own:

  H_g = mean over t of  w_tg x_t x_t^T,   w_tg = mean over rows i of g of E[(dL/dy_ti)^2]

A plain Hessian is w = 1. Algorithms know nothing of it: statistics are fed inputs scaled by the
roots (`algorithms.statistics.RowGroups`). Here w is the power `POWER` of that mean, divided by its
mean over the text: one token may have hundreds of times the square of most, and a Hessian of few
tokens is that of their noise.

Here L is the KL to the model's own predictions, whose second derivative by the logits is
diag(p) - p p^T at every position; E is over gradients u = r z - p (r . z) at the logits, r being
sqrt(p) and z standard normal, of which that is the covariance. (The paper takes the loss on the
text. Gradients of tokens drawn from p have the same covariance as u, but their squares vary far
more: mostly next to nothing, rarely a lot.) Each of `DRAWS` gradients is pulled back through the
model.

One pass before the conversion. The text runs through the model block by block, the inputs of every
block staying in the work folder. Then, from the head backwards, each block runs again with
gradients, which are averaged over the rows of every group and forgotten. In memory: one block, a
few sequences' activations, `DRAWS` + 1 times the states. On disk: the states once per block. What
was done is kept: a pass that was killed goes on with the block it was at, to the same bytes.

Measured on novels-8m, block 2 or 5 alone in integers with groups of 128, `gptq` with clipping and
`target: weights`, 16,384 tokens, KL to the original on held-out text, sum of both:

           plain    G = 1, power 1 / 0.5    G = 4, power 1 / 0.5
  2 bits   .01438   .01342 / .01338         .01331 / .01309
  3 bits   .00382   not measured            .00357 / .00349

(G = 1 there is the mean over four groups' weights.) With `target: outputs`, block 5 in 2 bits:
plain .00583, G = 4 .00546, in 1.7 times the processor time. Weights of power 1 tell as much as 20
to 58% of the tokens in the matrices of the MLP and o, as 2 to 33% in q, k and v. No whole model was
measured so; with tokens drawn from p, one each, and G = 1, all of novels-8m in 4 bits lost .00332,
plain .00326.

Fails where: a matrix does not see every token (experts), or shares a parameter with others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.checkpoint.integrity import read_checked, write_checked
from compress_methods.conversion.part import BlockPart, Planned
from compress_methods.conversion.passes.refining import ELEMENTS
from compress_methods.conversion.planning.plan import HEAD_BLOCK, Job, Shard
from compress_methods.errors import CalibrationError
from compress_methods.evaluation.streamed import after_blocks, table_rows
from compress_methods.model.block_runner import BlockRunner
from compress_methods.system.progress import Progress

DRAWS = 1
"""Gradients per position."""
POWER = 0.5
STATES, GRADIENTS = "states", "gradients"


def groups_of(job: Job) -> int:
    """Groups of rows a matrix is solved in: as many as asked for, or the most below that which its
    rows can be cut into; 0 where none are asked for."""
    asked, slot = job.algorithm.loss_groups, job.slot
    specs = job.format.tensors(slot.rows, slot.cols).values()
    if not all(spec.rows_axis for spec in specs) or not job.algorithm.row_independent:
        return min(asked, 1)
    unit = job.format.alignment(slot.rows, slot.cols)[0]
    return next((g for g in range(asked, 1, -1) if slot.rows % (g * unit) == 0), min(asked, 1))


def asked_of(shard: Shard) -> dict[str, int]:
    """Groups of every matrix of a shard whose tokens are weighed."""
    return {job.slot.module: groups for job in shard.jobs if (groups := groups_of(job))}


def loss_weights(part: BlockPart) -> dict[str, Tensor]:
    """Weights [tokens, groups] of a part's matrices whose tokens are weighed; `CalibrationError`
    where they are gone."""
    if not asked_of(part.shard):
        return {}
    assert part.work is not None
    path = _weights(part.work, part.shard)
    found = read_checked(path)
    if found is None:
        raise CalibrationError(f"{path}: damaged; the same command makes it again")
    return found


def weigh(
    planned: Planned,
    runner: BlockRunner,
    tokens: Tensor,
    work: Path,
    shards: Sequence[Shard],
    label: str = "weighing tokens",
    quiet: bool = True,
) -> None:
    """Write the weights of those of the shards that have none yet.

    `runner` has what surrounds the blocks; tokens [sequences, length]. Raises `CalibrationError`
    for a matrix that does not see every token.
    """
    folder = work / "weighing"
    shards = [s for s in shards if asked_of(s) and read_checked(_weights(work, s)) is None]
    if shards:
        weighing = _Weighing(planned, runner, tokens, folder, shards)
        try:
            weighing.execute(label, quiet)
        except _Damaged:
            shutil.rmtree(folder)
            weighing.execute(label, quiet)
    shutil.rmtree(folder, ignore_errors=True)


def _weights(work: Path, shard: Shard) -> Path:
    return work / f"weights-{shard.name}.safetensors"


class _Damaged(Exception):
    """A file of the pass is not as it was written."""


Upstream = Callable[[Tensor], Sequence[Tensor]]
"""Gradients at some outputs, one per draw."""


class _Weighing:
    """The pass over a model, between two blocks."""

    def __init__(
        self,
        planned: Planned,
        runner: BlockRunner,
        tokens: Tensor,
        folder: Path,
        shards: Sequence[Shard],
    ) -> None:
        self.planned, self.runner, self.tokens, self.folder = planned, runner, tokens, folder
        self.count = len(planned.skeleton.blocks)
        self.shards = {self._place(shard): shard for shard in shards}
        self.lowest = min(self.shards)

    def _place(self, shard: Shard) -> int:
        """A block's index; the head comes after all."""
        assert shard.block is not None
        return self.count if shard.block == HEAD_BLOCK else shard.block

    def execute(self, label: str, quiet: bool) -> None:
        """Forwards, then backwards, from where an earlier call was stopped."""
        self.folder.mkdir(exist_ok=True)
        pulled = self._furthest(GRADIENTS)
        if pulled is not None and pulled <= max(self.shards):
            raise _Damaged
        total = 2 * self.count + 1 - self.lowest
        done = self._furthest(STATES) or 0 if pulled is None else 2 * self.count + 1 - pulled
        with Progress(total, label, done=done, quiet=quiet) as self.progress:
            states = self._embedded()
            if pulled is None:
                self._forward(states)
                self._save(GRADIENTS, self.count, self._head())
                pulled = self.count
            for index in range(pulled - 1, self.lowest - 1, -1):
                gradients = self._backward(index)
                if index > self.lowest:
                    self._save(GRADIENTS, index, gradients)
                self._path(STATES, index + 1).unlink(missing_ok=True)
                self._path(GRADIENTS, index + 1).unlink()

    def _embedded(self) -> Tensor:
        """States before the first block; the runner knows how blocks are called afterwards."""
        skeleton, rows = self.planned.skeleton, self.tokens.unique()
        parameter = skeleton.slots[skeleton.embedding].parameter
        table = table_rows(self.planned.source.slabs(parameter), rows)
        return self.runner.embed(self.tokens, table, rows)

    def _forward(self, states: Tensor) -> None:
        """Keep what goes into every block from the lowest on, and what comes out of the last."""
        first = self._furthest(STATES)
        if first is None:
            first = 0
            self._save(STATES, 0, states)
        else:
            states = self._load(STATES, first)
        for index in range(first, self.count):
            with self._loaded(index):
                self.runner.run(index, states)
            self._save(STATES, index + 1, states)
            if index < self.lowest:
                self._path(STATES, index).unlink()
            self.progress.step(1, f"layer {index}")

    def _head(self) -> Tensor:
        """Gradients [draws, sequences, length, hidden] at the last states."""
        skeleton, states = self.planned.skeleton, self._load(STATES, self.count)
        read = self.planned.source.read
        names = after_blocks(skeleton)
        self.runner.load({alias: read(owner) for alias, owner in names.items()})
        record = _Record(self.shards.get(self.count), self.tokens.numel())
        gradients = torch.empty(DRAWS, *states.shape)
        for at in range(len(states)):

            def drawn(logits: Tensor, at: int = at) -> list[Tensor]:
                return [probe(logits, draw * len(states) + at) for draw in range(DRAWS)]

            mine = slice(at, at + 1)
            gradients[:, mine] = self._pull(self.runner.after, states[mine], drawn, record)
        self.runner.unload(skeleton.head)
        self._finish(self.count, record)
        return gradients

    def _backward(self, index: int) -> Tensor:
        """Gradients at the inputs of a block, of those at its outputs."""
        states, upstream = self._load(STATES, index), self._load(GRADIENTS, index + 1)
        record = _Record(self.shards.get(index), self.tokens.numel())
        device = self.runner.device
        length, width = states.shape[1:]
        piece = min(self.runner.batch, max(1, ELEMENTS[device.type] // (length * width)))
        with self._loaded(index):
            for at in range(0, len(states), piece):
                mine = slice(at, at + piece)

                def given(found: Tensor, mine: slice = mine) -> list[Tensor]:
                    return [g.to(device, found.dtype) for g in upstream[:, mine]]

                def forward(x: Tensor) -> Tensor:
                    return self.runner.forward(index, x)

                upstream[:, mine] = self._pull(forward, states[mine], given, record)
        self._finish(index, record)
        return upstream

    def _pull(
        self,
        forward: Callable[[Tensor], Tensor],
        states: Tensor,
        upstream: Upstream,
        record: _Record,
    ) -> Tensor:
        """Gradients [draws, sequences, length, hidden] at some states."""
        x = states.to(self.runner.device, self.runner.dtype).requires_grad_()
        with torch.enable_grad(), record.watching(self.planned.skeleton.module) as outputs:
            found = forward(x)
        pulled = []
        wanted = upstream(found.detach())
        for left, gradient in enumerate(wanted, 1 - len(wanted)):
            at_x, *at_outputs = torch.autograd.grad(
                found, [x, *outputs.values()], gradient, retain_graph=left < 0, allow_unused=True
            )
            record.add(dict(zip(outputs, at_outputs, strict=True)))
            pulled.append(at_x.float().cpu())
        record.advance(states.shape[0] * states.shape[1])
        return torch.stack(pulled)

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        prefix = f"{self.planned.skeleton.blocks_name}.{index}"
        self.planned.load(self.runner, prefix)
        yield
        self.runner.unload(prefix)

    def _finish(self, place: int, record: _Record) -> None:
        """Write the weights of a block, or the head."""
        if place in self.shards:
            write_checked(_weights(self.folder.parent, self.shards[place]), record.weights())
        self.progress.step(1, f"layer {place}, backwards" if place < self.count else "head")

    # Files

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def _save(self, kind: str, index: int, tensor: Tensor) -> None:
        write_checked(self._path(kind, index), {kind: tensor.to(self.runner.dtype)})

    def _load(self, kind: str, index: int) -> Tensor:
        """In float32; `_Damaged` where it is not there."""
        found = read_checked(self._path(kind, index))
        if found is None:
            raise _Damaged
        return found[kind].float()

    def _furthest(self, kind: str) -> int | None:
        """The place that the pass has come to: states go up, gradients down."""
        found = [
            int(path.stem.partition("-")[2]) for path in self.folder.glob(f"{kind}-*.safetensors")
        ]
        return (min if kind == GRADIENTS else max)(found, default=None)


class _Record:
    """Squared gradients of one part: sums over the draws [tokens, groups], by module."""

    def __init__(self, shard: Shard | None, tokens: int) -> None:
        self.groups = {} if shard is None else asked_of(shard)
        self.sums = {name: torch.zeros(tokens, count) for name, count in self.groups.items()}
        self.added = dict.fromkeys(self.groups, 0)
        self.tokens, self.at, self.here = tokens, 0, 0

    @contextmanager
    def watching(self, module: Callable[[str], nn.Module]) -> Iterator[dict[str, Tensor]]:
        """The outputs of the modules that run meanwhile."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                outputs[name] = out
                return out.clone()  # what follows may change it in place

            return hook

        with ExitStack() as hooks:
            for name in self.groups:
                hooks.callback(module(name).register_forward_hook(keep(name)).remove)
            yield outputs

    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Those of one draw at the outputs of the tokens that come next."""
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            groups = self.groups[name]
            squares = gradient.float().square().reshape(-1, groups, gradient.shape[-1] // groups)
            found = squares.mean(-1).cpu()
            self.sums[name][self.at : self.at + len(found)] += found
            self.added[name] += len(found)

    def advance(self, count: int) -> None:
        """Go on to the tokens after the next `count`; each must have been added in every draw."""
        self.at += count
        for name, added in self.added.items():
            if added != self.at * DRAWS:
                raise CalibrationError(
                    f"{name}: loss_groups needs a layer that every token goes through, and that "
                    "the output depends on; leave it out of this rule"
                )

    def weights(self) -> dict[str, Tensor]:
        """[tokens, groups] by module, every group's mean 1."""
        found = {}
        for name, sums in self.sums.items():
            powers = sums.pow(POWER)
            mean = powers.mean(0)
            found[name] = torch.where(mean > 0, powers / mean, torch.ones_like(sums))
        return found


def probe(logits: Tensor, seed: int) -> Tensor:
    """A gradient at `logits` [sequences, length, vocabulary] whose covariance at every position is
    the second derivative of the KL there, diag(p) - p p^T; the same on every device."""
    p = logits.float().softmax(-1)
    z = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    turned = z.to(p.device).mul_(p.sqrt())
    return turned.sub_(p.mul_(turned.sum(-1, keepdim=True))).to(logits.dtype)

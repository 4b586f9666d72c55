"""What a training takes, before it starts: memory and time, from shapes and this machine's speed.

With T values in the teacher, S in the student and P that move, in float32:

    memory    T + 2 S (as loaded, as computed with) + 7 P (twice as begun, once to go back to,
              themselves, gradients, two moments), the activations of a batch, and logits with what
              a loss makes of them
    products  T + 3 S for a token learnt, T none with `top_k`, S once more with
              `gradient_checkpointing`; T + S for one that is judged; what models write themselves
              token by token takes longer

Of several processes each has that, with its share of a batch. With `shard` each of N has

    memory    1/N of the teacher's blocks, of 5 P (as above, but for what it began with) and, with
              `lora`, of the student's blocks; whole what surrounds the blocks, with its gradients,
              and packed codes; two blocks of the teacher, and eight times one of the student

and main memory has room for one model more, which is being read.

Fails where: attention over long texts costs more than matrices do, or other jobs share the cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress_methods.conversion.planning.preview import build
from compress_methods.conversion.resources import BASE_BYTES, NARROW_MATMUL
from compress_methods.conversion.stages import Stage
from compress_methods.errors import RecipeError
from compress_methods.formats import ITEMSIZE, Format
from compress_methods.model.skeleton import Skeleton
from compress_methods.recipe.stages import StagedRecipe
from compress_methods.recipe.training import DISTILL, QAT, SFT, Training
from compress_methods.system.memory import available_bytes
from compress_methods.system.words import size_text
from compress_methods.training.objectives.chunks import LIMIT

FLOAT = 4
TRAINER_BYTES = 200 * 2**20
"""Of transformers' Trainer and what it imports."""
COPIES = 7
LOGITS = 9
"""Tensors as large as the logits that a loss and its gradients are made of."""
STATES, CHANNELS = 12, 4
"""Tensors kept of a block, as wide as the states and as its feed-forward part."""
CHECKS = 13
"""How often held-out text is read: on the way, at the start, and reported on twice."""
USED = 0.4
"""Of the speed of large products."""
SHARED_COPIES = 5
TOGETHER, PASSING = 2, 8
"""Blocks of the teacher, and tensors as large as one of the student, that are there at a time."""
Packed = Sequence[tuple[Format, int, int]]
"""Formats of matrices, their rows and columns."""


@dataclass(frozen=True)
class Planned:
    """A training of a student, of whose matrices some are `packed`, by so many `processes`, of
    which some are `here`, on this machine."""

    training: Training
    teacher: Skeleton
    student: Skeleton
    packed: Packed = ()
    processes: int = 1
    here: int = 1

    @property
    def moved(self) -> int:
        """How many values move, but for norms beside packed matrices, which are few."""
        training, student = self.training, self.student
        if training.lora and not self.packed:
            slots = (slot for slot in student.slots.values() if slot.kind == "blocks")
            return sum(training.lora * (slot.rows + slot.cols) for slot in slots)
        weights = sum(rows * cols for _, rows, cols in self.packed)
        found = sum(
            math.prod(spec.shape)
            for fmt, rows, cols in self.packed
            for spec in fmt.tensors(rows, cols).values()
            if "float" in spec.dtype and ITEMSIZE[spec.dtype] > 1
        )
        if training.train in (DISTILL, SFT):
            found += values_of(student) - weights
        return found + (weights if training.train == QAT else 0)

    @property
    def memory(self) -> int:
        """Bytes at the peak, in each process."""
        return self._held + math.ceil(self.training.batch / self.processes) * self._activations

    @property
    def needed(self) -> int:
        """Bytes of this machine that all processes on it take."""
        return self.here * self.memory + self._reading

    @property
    def _held(self) -> int:
        """Bytes in each process without activations."""
        whole = values_of(self.teacher) + 2 * values_of(self.student) + COPIES * self.moved
        values = self._share if self.training.shard else whole
        return BASE_BYTES + TRAINER_BYTES + FLOAT * values

    @property
    def _reading(self) -> int:
        """Bytes of a model that is read before it is divided."""
        largest = max(values_of(self.teacher), values_of(self.student) + 2 * self.moved)
        return FLOAT * largest if self.training.shard else 0

    @property
    def _share(self) -> int:
        """Values that are in each process where the training is divided."""
        theirs, mine = _around(self.teacher), _around(self.student)
        blocks, own = (values_of(one) - _around(one) for one in (self.teacher, self.student))
        divided = blocks + SHARED_COPIES * self.moved + (own if self.training.lora else 0)
        whole = theirs + mine + 2 * min(mine, self.moved)
        codes = sum(fmt.nbytes(rows, cols) for fmt, rows, cols in self.packed) // FLOAT
        passing = TOGETHER * blocks // len(self.teacher.blocks)
        passing += PASSING * own // len(self.student.blocks)
        return math.ceil(divided / self.processes) + whole + codes + passing

    @property
    def _activations(self) -> int:
        """Bytes kept of a sequence for the way back."""
        training, blocks = self.training, len(self.student.blocks)
        config = self.student.model.config.get_text_config()
        hidden = config.hidden_size
        channels = getattr(config, "intermediate_size", None) or 4 * hidden
        inside = STATES * hidden + CHANNELS * channels
        again = training.gradient_checkpointing or training.shard
        kept = blocks * hidden + inside if again else blocks * inside
        logits = training.length * config.vocab_size
        if not (training.match or training.teacher_mix):
            logits = min(logits, LIMIT // training.batch)
        return int(FLOAT * (training.length * kept + LOGITS * logits))

    def batch_within(self, free: int) -> int:
        """The largest batch that fits into so many bytes, 0 where none does."""
        rest = free - self.here * self._held - self._reading
        each = max(0, rest // (self.here * self._activations))
        return each * self.processes

    def seconds(self, flops: float) -> float:
        """On a machine that does so many operations a second in large products."""
        training = self.training
        theirs, mine = values_of(self.teacher), values_of(self.student)
        tokens = training.steps * training.batch * training.length
        asked = 0 if training.by_token or training.top_k else theirs
        products = tokens * (
            asked + (4 if training.gradient_checkpointing or training.shard else 3) * mine
        )
        products += CHECKS * training.held_out * training.length * (theirs + mine)
        text = training.text.rows * training.length
        products += text * theirs if training.top_k else 0
        one_by_one = training.on_policy * tokens * mine
        one_by_one += text * theirs if training.writes_itself else 0
        return 2 * (products + one_by_one / NARROW_MATMUL) / (USED * flops)


def planned_of(
    recipe: StagedRecipe, stages: Sequence[Stage], processes: int = 1
) -> Iterator[Planned]:
    """The trainings of a recipe whose other stages are planned, by processes of one machine."""
    teacher = stages[0].planned.skeleton
    for place, training in recipe.training:
        done, student, packed = 0, teacher, list[tuple[Format, int, int]]()
        for stage in stages:
            if done >= place:
                break
            done += len(stage.passes) + stage.packs
            student = stage.planned.skeleton
            if stage.reshaping is not None:
                student = build(stage.changed, stage.name)
            elif stage.packs and done <= place:
                jobs = stage.planned.plan.jobs
                packed = [(job.format, job.slot.rows, job.slot.cols) for job in jobs]
        yield Planned(training, teacher, student, packed, processes, processes)


def _around(skeleton: Skeleton) -> int:
    """Parameters of a model that are of no block."""
    named = skeleton.model.named_parameters()
    return sum(one.numel() for name, one in named if skeleton.block_of(name) is None)


def values_of(skeleton: Skeleton) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in skeleton.model.parameters())


def require_memory(planned: Planned, what: str) -> None:
    """`RecipeError` where a training takes more than is free, with the batch that would fit."""
    free = available_bytes()
    if planned.needed <= free:
        return
    batch = planned.batch_within(free)
    fits = f"; batch: {batch} fits" if batch else ""
    several = f" in {planned.here} processes" if planned.here > 1 else ""
    raise RecipeError(
        f"{what} takes about {size_text(planned.needed)} of memory{several}, {size_text(free)} are "
        f"free{fits}"
    )

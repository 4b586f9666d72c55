"""transformers' Trainer with the loss of `objective.py`.

Ten times on the way the held-out KL is measured and a checkpoint written, from which a training
that was killed goes on. The best of them is what is left at the end; that may be the start. A loss
that is not finite, or a KL of more than `WORST` times its start, ends the training.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_callback import PrinterCallback

from compress_methods.conversion.running import Running
from compress_methods.model.skeleton import quiet_transformers
from compress_methods.recipe.training import QAT, Training
from compress_methods.system.processes import Processes
from compress_methods.system.progress import Progress
from compress_methods.training import shards
from compress_methods.training.lessons import Row
from compress_methods.training.material import Batch, collate
from compress_methods.training.objectives.objective import Objective
from compress_methods.training.student import Student

CHECKS = 10
MOMENTUM = 0.9
WARM_UP = 0.05
WORST = 2.0
NOTICEABLE = 1e-4
"""KL of a start that is nearly perfect may grow by so much without a word."""
WHOLE = "whole"
"""A file in a checkpoint that was written to its end."""
SCHEDULER = "scheduler.pt"
KL = "eval_loss"
LOSS = "loss"


@dataclass
class Outcome:
    """What a training came to. Curves are [step, value] pairs: the `loss` on what it learns from
    and the `kl` on what it is judged by; `best` is the step that was kept."""

    best: int = 0
    loss: list[tuple[int, float]] = field(default_factory=list)
    kl: list[tuple[int, float]] = field(default_factory=list)
    note: str = ""


def train(
    student: Student,
    teacher: Any,
    rows: Sequence[Row],
    settings: Training,
    work: Path,
    progress: Progress,
    running: Running | None = None,
) -> Outcome:
    """Train on the first of the `sequences + 2 * held_out` rows, judged by those after them; the
    student is then the best that there was. Checkpoints go to `work`."""
    running = running or Running(student.trained[0].device)
    processes = running.processes
    judged = rows[settings.sequences : settings.sequences + settings.held_out]
    objective = Objective(settings, teacher, student)
    watcher = _Watcher(progress, LOSS if settings.by_token else "KL", processes)
    lesson = _Lesson(student, objective)
    if settings.shard:
        shards.divide_rest(lesson, running)
    start = [parameter.detach().clone() for parameter in student.trained]
    trainer = (_Divided if settings.shard else _Distiller)(
        lesson,
        _arguments(settings, work, student.trained[0].device, processes.count),
        data_collator=collate,
        train_dataset=rows[: settings.sequences],
        eval_dataset=judged,
        callbacks=[watcher],
    )
    trainer.settings, trainer.watcher = settings, watcher
    trainer.remove_callback(PrinterCallback)
    with processes.in_turn():
        begun = _last_checkpoint(work)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    outcome = _outcome(trainer.state.log_history, watcher)
    if outcome.best == 0:
        with torch.no_grad():
            for parameter, value in zip(student.trained, start, strict=True):
                parameter.copy_(value)
    return outcome


class _Lesson(nn.Module):
    """The loss as a module, which several processes can be told to average the gradients of."""

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, inputs: Batch, step: int) -> Tensor:
        if self.training:
            return self.objective.learned(self.student, inputs, step)
        return self.objective.judged(self.student, inputs)


class _Watcher(TrainerCallback):
    """Progress, limits of what is stored, the mark of a whole checkpoint, and the end of a training
    that makes things worse."""

    def __init__(self, progress: Progress, judged_by: str, processes: Processes) -> None:
        self.processes = processes
        self.progress, self.note, self.last = progress, "", ""
        self.judged_by = f"held-out {judged_by}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.skip(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["model"].student.limit()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step(1, self.last)
        if self.note:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.processes.wait()  # all have files in it
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        kl = metrics[KL]
        self.last = f"{self.judged_by} {kl:.4f}"
        first = next((line[KL] for line in state.log_history if KL in line), kl)
        if not kl <= max(WORST * first, first + NOTICEABLE):
            self.stop(f"{self.judged_by} was {kl:.4f} after {state.global_step} steps")
            control.should_training_stop = True

    def stop(self, why: str) -> None:
        self.note = self.note or f"diverged: {why}; the best until then was kept, try a lower rate"


class _Distiller(Trainer):
    """`settings` and `watcher` are set before it trains."""

    settings: Training
    watcher: _Watcher

    def create_optimizer(self, *_: Any, **__: Any) -> Any:
        groups = self.model.student.groups(self.settings.learning_rate)
        if self.settings.train == QAT:
            # Of codes only those are to change whose gradient is large beside their row's and
            # column's; Adam would move all alike.
            fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            self.optimizer = Adafactor(groups, beta1=MOMENTUM, **fixed)
        else:
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Tensor:
        step = self.state.global_step
        loss: Tensor = model(inputs, step)
        # All processes have to stop, or those that do not wait for ever.
        every = self.accelerator.gather(loss.detach()) if model.training else None
        if every is not None and not every.isfinite().all():
            self.watcher.stop(f"the loss of step {step + 1} is {every.mean().item()}")
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class _Divided(_Distiller):
    """Each process saves and loads its own share."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        # Or it would be wrapped to average gradients, which is done. Only now, because
        # transformers has no way to save such a model, and says so when it begins.
        self.is_distributed_loading_by_transformers = True

    @property
    def _rank(self) -> int:
        return self.watcher.processes.rank

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        shards.save_model(self.model, Path(output_dir), self._rank)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        shards.load_model_share(self.model, Path(resume_from_checkpoint), self._rank)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        shards.save_optimizer(self.optimizer, Path(output_dir), self._rank)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            shards.load_optimizer(self.optimizer, Path(checkpoint), self._rank)
            saved = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
            self.lr_scheduler.load_state_dict(saved)


def _arguments(
    settings: Training, work: Path, device: torch.device, processes: int
) -> TrainingArguments:
    interval = max(1, settings.steps // CHECKS)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch // processes,
        per_device_eval_batch_size=settings.batch // processes,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP * settings.steps),
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=interval,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=KL,
        greater_is_better=False,
        logging_steps=max(1, interval // 2),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or it would split batches over all GPUs, and the teacher has but one
    return arguments


def _last_checkpoint(work: Path) -> Path | None:
    """The last whole one; those that are not are deleted."""
    found = []
    for path in work.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _outcome(lines: list[dict[str, Any]], watcher: _Watcher) -> Outcome:
    """Curves from the trainer's own log, a step that was logged twice once."""
    loss = {line["step"]: line["loss"] for line in lines if "loss" in line}
    kl = {line["step"]: line[KL] for line in reversed(lines) if KL in line}
    finite = {step: value for step, value in kl.items() if math.isfinite(value)}
    best = min(sorted(finite), key=lambda step: finite[step], default=0)
    return Outcome(best, sorted(loss.items()), sorted(kl.items()), watcher.note)

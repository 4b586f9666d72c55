"""Converting one unit: the matrices of one output file, chosen, packed and written.

Streaming, when no calibration runs: matrix by matrix, slab by slab, straight into the file.
With calibration: the block is materialized, its inputs gathered, its matrices solved, and the
states moved on through the compressed block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.algorithms.base import Algorithm, Gathered, relative_error
from compress_methods.compressed import Matrix
from compress_methods.conversion.blocks import BlockRunner
from compress_methods.conversion.checkpoint import Source, require_finite
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.plan import Job, Unit
from compress_methods.errors import CalibrationError
from compress_methods.evaluate import Sums, compare_logits
from compress_methods.formats import Format, TensorSpec
from compress_methods.loading import quantize_inputs
from compress_methods.progress import Progress
from compress_methods.safetensors_io import Writer, read_header
from compress_methods.skeleton import Skeleton

CALIBRATION, HELD_BASE, HELD_COMPRESSED = "calibration", "held_base", "held_compressed"
SOLVE_ELEMENTS = 2**25
Facts = dict[str, Any]


@dataclass
class Converter:
    """What every unit needs. `runner` and `states` are there only when calibration runs."""

    skeleton: Skeleton
    source: Source
    journal: Journal
    progress: Progress
    runner: BlockRunner | None = None
    states: dict[str, Tensor] | None = None

    def convert(self, unit: Unit) -> Facts:
        """Write the unit's file; returns its facts for journal and report."""
        if self.runner is None or unit.block is None:
            return self._stream(unit)
        return self._head(unit) if unit.block < 0 else self._block(unit, unit.block)

    def _stream(self, unit: Unit) -> Facts:
        modules = {}
        with Writer(self.journal.directory / unit.file, self._specs(unit)) as writer:
            for job in unit.jobs:
                stored, modules[job.target.module] = self._solve_slabs(job)
                for name in job.specs:
                    writer.put(name, stored.pop(name))
                self._step(job)
            self._copy(unit, writer)
        return {"modules": modules}

    def _solve_slabs(self, job: Job) -> tuple[dict[str, Tensor], Facts]:
        """Solve a matrix without calibration, a slab of rows at a time where that is possible."""
        rows, cols = job.target.rows, job.target.cols
        fmt = job.format
        specs = fmt.tensors(rows, cols)
        sliceable = job.algorithm.row_independent and all(s.rows_axis for s in specs.values())
        prepared = job.algorithm.prepare(None, fmt)
        parameter = f"{job.target.module}.weight"
        if job.target.transposed or not sliceable:
            weight = self.source.read(parameter).float()
            return self._solve(job, weight.T if job.target.transposed else weight, prepared)
        stored = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        error, energy, zeros = 0.0, 0.0, [0, 0]
        for first, slab in self.source.slabs(parameter, fmt.units(rows, cols)[0]):
            weight = slab.float()
            packed = fmt.pack(job.algorithm.solve(weight, prepared, fmt))
            _place(fmt, packed, stored, (rows, cols), (first, first + len(slab)))
            here = float(torch.linalg.vecdot(weight, weight).sum(dtype=torch.float64))
            values = fmt.unpack(packed)[: len(slab)]
            error += relative_error(weight, values) * here
            energy += here
            zeros = [a + b for a, b in zip(zeros, count_zeros(values), strict=True)]
        facts = self._facts(job, error / max(energy, 1e-30), None, zeros)
        return {f"{job.target.module}.{k}": v for k, v in stored.items()}, facts

    def _solve(
        self, job: Job, weight: Tensor, prepared: Any, gathered: Gathered = None
    ) -> tuple[dict[str, Tensor], Facts]:
        """Solve a matrix that is in memory; large ones in several row slabs."""
        fmt, (rows, cols) = job.format, weight.shape
        unit = fmt.units(rows, cols)[0]
        step = rows
        if job.algorithm.row_independent:
            step = max(unit, SOLVE_ELEMENTS // cols // unit * unit)
        specs = fmt.tensors(rows, cols)
        if step >= rows or not all(spec.rows_axis for spec in specs.values()):
            stored = fmt.pack(job.algorithm.solve(weight.contiguous(), prepared, fmt))
        else:
            stored = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in specs.items()}
            for first in range(0, rows, step):
                last = min(first + step, rows)
                slab = weight[first:last].contiguous()
                packed = fmt.pack(job.algorithm.solve(slab, prepared, fmt))
                _place(fmt, packed, stored, (rows, cols), (first, last))
        values = fmt.unpack(stored)
        output = None if gathered is None else relative_error(weight, values, gathered)
        facts = self._facts(job, relative_error(weight, values), output, count_zeros(values))
        return {f"{job.target.module}.{name}": tensor for name, tensor in stored.items()}, facts

    def _facts(
        self, job: Job, weight_error: float, output_error: float | None, zeros: Sequence[int]
    ) -> Facts:
        """`zeros` as `count_zeros` gives them."""
        original = self.source.entry(f"{job.target.module}.weight")
        return {
            "format": job.format.describe(),
            "algorithm": job.algorithm.name,
            "shape": [job.target.rows, job.target.cols],
            "bytes_before": original.nbytes,
            "bytes_after": sum(spec.nbytes for spec in job.specs.values()),
            "weight_error": weight_error,
            "output_error": output_error,
            "zeros": zeros[0] / (job.target.rows * job.target.cols),
            "zero_rows": zeros[1],
        }

    def _block(self, unit: Unit, index: int) -> Facts:
        assert self.runner is not None
        assert self.states is not None
        prefix = f"{self.skeleton.blocks_name}.{index}"
        self.runner.load(self.parameters(prefix))
        needs = {
            j.target.module: j.algorithm.needs for j in unit.jobs if j.algorithm.needs != "nothing"
        }
        groups = self.runner.gather(index, self.states[CALIBRATION], needs) if needs else []
        if HELD_BASE in self.states:
            self.runner.run(index, self.states[HELD_BASE])
        stored, modules = self._solve_groups(unit, groups)
        self._write(unit, stored)
        for name in (CALIBRATION, HELD_COMPRESSED):
            self.runner.run(index, self.states[name])
        self.runner.unload(prefix)
        self.journal.save_states(index + 1, self.states)
        return {"modules": modules}

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a module as the source holds them, by their names in the model."""
        names = self.skeleton.parameter_names()
        return {name: self.source.read(name) for name in names if name.startswith(f"{prefix}.")}

    def _solve_groups(
        self, unit: Unit, groups: list[tuple[list[str], Gathered]]
    ) -> tuple[dict[str, Tensor], Facts]:
        """Solve every matrix of a materialized unit and put its values in the model."""
        of_module = {name: gathered for names, gathered in groups for name in names}
        stored: dict[str, Tensor] = {}
        modules: Facts = {}
        prepared: dict[tuple[int, Algorithm, Format], Any] = {}
        for job in unit.jobs:
            name = job.target.module
            if job.algorithm.needs != "nothing" and name not in of_module:
                raise CalibrationError(f"{name}: never ran during calibration; leave it out")
            gathered = of_module.get(name)
            key = (id(gathered), job.algorithm, job.format)
            if key not in prepared:
                prepared.clear()
                prepared[key] = job.algorithm.prepare(gathered, job.format)
            module = self.skeleton.module(name)
            weight: Tensor = module.weight.data
            matrix = weight.T if job.target.transposed else weight
            tensors, modules[name] = self._solve(job, matrix, prepared[key], gathered)
            stored |= tensors
            short = {key.removeprefix(f"{name}."): t for key, t in tensors.items()}
            values = job.format.unpack(short)
            weight.copy_(values.T if job.target.transposed else values)
            if name != self.skeleton.head:
                quantize_inputs(module, job.format)
            self._step(job)
        return stored, modules

    def _head(self, unit: Unit) -> Facts:
        """The output head: solved from the last states, then both models' held-out logits."""
        assert self.runner is not None
        assert self.states is not None
        head = self.skeleton.head
        jobs = {job.target.module: job for job in unit.jobs}
        original = self.source.read(f"{head}.weight")
        self.runner.load({f"{head}.weight": original})
        groups: list[tuple[list[str], Gathered]] = []
        if head in jobs and jobs[head].algorithm.needs != "nothing":
            gathered = self.runner.gather_head(self.states[CALIBRATION], jobs[head].algorithm.needs)
            groups = [([head], gathered)]
        stored, modules = self._solve_groups(unit, groups)
        self._write(unit, stored)
        return {"modules": modules}

    def _write(self, unit: Unit, stored: dict[str, Tensor]) -> None:
        with Writer(self.journal.directory / unit.file, self._specs(unit)) as writer:
            for job in unit.jobs:
                for name in job.specs:
                    writer.put(name, stored[name])
            self._copy(unit, writer)

    def _copy(self, unit: Unit, writer: Writer) -> None:
        for name in unit.copies:
            self._put(name, writer, name)

    def _put(self, name: str, writer: Writer, stored: str) -> None:
        """Copy a tensor of the source, a slab at a time, under the name it is `stored` by."""
        entry = self.source.entries[name]
        for _, slab in entry.slabs():
            writer.put(stored, require_finite(entry, slab))
        self.progress.step(entry.nbytes, stored)

    def _specs(self, unit: Unit) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for job in unit.jobs:
            specs |= job.specs
        for name in unit.copies:
            entry = self.source.entries[name]
            specs[name] = TensorSpec(entry.shape, entry.dtype)
        return specs

    def _step(self, job: Job) -> None:
        self.progress.step(
            self.source.entry(f"{job.target.module}.weight").nbytes, job.target.module
        )


def count_zeros(values: Tensor) -> tuple[int, int]:
    """Zeros in a matrix, and rows of nothing else."""
    zero = values == 0
    return int(zero.sum()), int(zero.all(1).sum())


def _place(
    fmt: Format,
    packed: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    shape: tuple[int, int],
    rows: tuple[int, int],
) -> None:
    """Copy the stored tensors of a slab of rows to where they lie in those of the whole matrix."""
    for name, window in fmt.slice(stored, shape, rows=rows).items():
        window.copy_(packed[name])


def read_matrix(file: Path, job: Job) -> Matrix:
    """A job's result as its unit's file holds it."""
    entries = read_header(file)
    rows, cols = job.target.rows, job.target.cols
    stored = {n: entries[f"{job.target.module}.{n}"] for n in job.format.tensors(rows, cols)}
    return Matrix(job.target.module, rows, cols, job.format, stored)


def embedding_rows(converter: Converter, unit: Unit, rows: Tensor) -> dict[str, Tensor]:
    """Rows `rows` of the token table, original (`base`) and as stored in the unit's file."""
    name = f"{converter.skeleton.embedding}.weight"
    pieces = []
    for first, slab in converter.source.slabs(name):
        mine = rows[(rows >= first) & (rows < first + len(slab))]
        pieces.append(slab[mine - first].float())
    base = torch.cat(pieces)
    job = next((j for j in unit.jobs if j.target.module == converter.skeleton.embedding), None)
    if job is None:
        return {"base": base, "compressed": base}
    matrix = read_matrix(converter.journal.directory / unit.file, job)
    fmt, stored = job.format, {name: entry.read() for name, entry in matrix.entries.items()}
    prepared = fmt.prepare(stored, matrix.rows, matrix.cols, gather=True)
    return {"base": base, "compressed": fmt.embed(rows, prepared, torch.float32)}


def compare_held_out(
    runner: BlockRunner,
    states: Mapping[str, Tensor],
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    head_format: Format | None,
) -> Sums:
    """Held-out sequences through both heads, `weights` `base` and `compressed` [vocab, hidden]."""
    head = runner.skeleton.module(runner.skeleton.head)
    sums = Sums()
    name = f"{runner.skeleton.head}.weight"
    shared = weights["base"] is weights["compressed"]
    runner.load({name: weights["base"]})
    for i in range(len(tokens)):
        logits = {}
        for which, key in (("base", HELD_BASE), ("compressed", HELD_COMPRESSED)):
            if not shared:
                runner.load({name: weights[which]})
            with ExitStack() as stack:
                if which == "compressed" and head_format is not None:
                    stack.callback(quantize_inputs(head, head_format).remove)
                logits[which] = runner.logits(states[key][i : i + 1])[0, :-1]
        sums += compare_logits(logits["base"], logits["compressed"], tokens[i, 1:])
    return sums

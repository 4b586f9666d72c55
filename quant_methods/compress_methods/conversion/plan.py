"""What a conversion will do, decided before any work: which module gets which format from which
algorithm, which file holds what, and how many bytes come out.

A unit is one output file: embeddings (and everything else outside the blocks), one per block, and
the head. Everything a recipe can get wrong about a model is found here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from compress_methods.algorithms import Algorithm
from compress_methods.conversion.checkpoint import Source
from compress_methods.conversion.recipe import ModuleRule, Recipe
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Format, TensorSpec
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import Sparse
from compress_methods.quantization_config import CompressionSpec, Rule
from compress_methods.sharding import check_matrix
from compress_methods.skeleton import Skeleton, Target

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EMBEDDINGS, HEAD = "embeddings", "head"
STEPS = 16


@dataclass(frozen=True)
class Job:
    """One matrix to compress. Formats to choose from, where `split.py` is to choose."""

    target: Target
    format_name: str
    format: Format
    algorithm: Algorithm
    choices: tuple[Sparse, ...] = ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Checkpoint tensors by their full names."""
        tensors = self.format.tensors(self.target.rows, self.target.cols)
        return {f"{self.target.module}.{name}": spec for name, spec in tensors.items()}


@dataclass(frozen=True)
class Unit:
    """One output file: compressed matrices, then tensors copied as they are."""

    name: str
    block: int | None
    jobs: tuple[Job, ...]
    copies: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class Plan:
    """Everything decided: units in order, `dropped` original tensors with the reason, `renamed`
    ones that are stored under another name."""

    recipe: Recipe
    units: tuple[Unit, ...]
    dropped: dict[str, str]
    original_bytes: int
    compressed_bytes: int
    tied: dict[str, str]
    embedding: str
    targets: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        return [job for unit in self.units for job in unit.jobs]

    @property
    def needs_calibration(self) -> bool:
        return any(job.algorithm.needs != "nothing" for job in self.jobs)

    def compression_spec(self, base_model: str, tool_version: str) -> CompressionSpec:
        """The `quantization_config` of the result."""
        used = {job.format_name: job.format for job in self.jobs}
        return CompressionSpec(
            formats=used,
            modules=_rules(self.jobs, self.targets),
            embedding=self.embedding,
            tied=self.tied,
            base_model=base_model,
            recipe_sha256=self.recipe.sha256,
            tool_version=tool_version,
        )


def make_plan(
    recipe: Recipe, skeleton: Skeleton, source: Source, tensor_parallel_size: int = 1
) -> Plan:
    """Decide everything; `RecipeError` where recipe and model do not fit, `FormatError` where a
    matrix cannot be cut for that many ranks."""
    jobs = {job.target.module: job for job in _jobs(recipe, skeleton, tensor_parallel_size)}
    if not jobs:
        raise RecipeError(f"recipe {recipe.name!r} matches no module of {source.name}")
    _check_fused(jobs, skeleton)
    _check_split(jobs, recipe)
    units = tuple(make_units(jobs, skeleton, source))
    copied = {name for unit in units for name in unit.copies}
    used = {source.names[f"{module}.weight"] for module in jobs}
    dropped = {}
    for name in source.entries:
        if name not in copied and name not in used:
            dropped[name] = "tied to the embedding, stored once"
    total = sum(s.nbytes for job in jobs.values() for s in job.specs.values())
    total += sum(source.entries[name].nbytes for name in copied)
    return Plan(
        recipe,
        units,
        dropped,
        source.nbytes,
        total,
        skeleton.tied,
        skeleton.embedding,
        tuple(skeleton.targets),
    )


def _jobs(recipe: Recipe, skeleton: Skeleton, ways: int) -> Iterator[Job]:
    unused = list(recipe.modules)
    for target in skeleton.targets.values():
        rule = _rule_for(recipe, target)
        if rule is None:
            continue
        if rule in unused:
            unused.remove(rule)
        fmt = recipe.formats[rule.format]
        if isinstance(fmt, Dense):
            continue
        if target.kind == "embedding" and rule.algorithm.needs != "nothing":
            raise RecipeError(
                f"{target.module}: algorithm {rule.algorithm.name!r} needs the inputs of a linear "
                "layer, a token table has none; use rtn for it"
            )
        try:
            fmt.check_shape(target.rows, target.cols)
        except FormatError as problem:
            raise RecipeError(
                f"{target.module} [{target.rows}, {target.cols}]: {problem} "
                f"(format {rule.format!r})"
            ) from problem
        check_matrix(target.module, target.kind, (target.rows, target.cols), fmt, ways)
        choices: tuple[Sparse, ...] = ()
        if rule.split and isinstance(fmt, Sparse) and target.kind == "blocks":
            choices = tuple(around(fmt, target, ways))
        yield Job(target, rule.format, fmt, rule.algorithm, choices)
    for rule in unused:
        if rule.match == ("lm_head",) and skeleton.tied:
            continue
        raise RecipeError(
            f"recipe {recipe.name!r}: match {', '.join(rule.match)} finds no module "
            "that an earlier rule has left"
        )


def around(fmt: Sparse, target: Target, ways: int) -> Iterator[Sparse]:
    """The format at up to seven n, its own in the middle: those that can hold the matrix and be cut
    for `ways` ranks."""
    shape = (target.rows, target.cols)
    step = max(1, fmt.m // STEPS)
    for n in range(fmt.n - 3 * step, fmt.n + 3 * step + 1, step):
        if 0 < n < fmt.m or n == fmt.n:
            other = dataclasses.replace(fmt, n=n)
            with contextlib.suppress(FormatError):
                other.check_shape(*shape)
                check_matrix(target.module, target.kind, shape, other, ways)
                yield other


def fused_group(module: str) -> str:
    """The same name for modules that vLLM runs as one matrix."""
    parent, _, leaf = module.rpartition(".")
    return next((f"{parent}.{'+'.join(group)}" for group in FUSED if leaf in group), module)


def _rule_for(recipe: Recipe, target: Target) -> ModuleRule | None:
    return next((r for r in recipe.modules if r.matches(target.module, target.kind)), None)


def _check_fused(jobs: dict[str, Job], skeleton: Skeleton) -> None:
    """vLLM runs these siblings as one matrix, so they must share a format."""
    for module in skeleton.targets:
        parent, _, leaf = module.rpartition(".")
        for group in FUSED:
            if leaf != group[0]:
                continue
            found = {
                part: jobs[f"{parent}.{part}"].format_name
                if f"{parent}.{part}" in jobs
                else "dense"
                for part in group
                if f"{parent}.{part}" in skeleton.targets
            }
            if len(set(found.values())) > 1:
                got = ", ".join(f"{part}: {fmt}" for part, fmt in found.items())
                raise RecipeError(
                    f"{parent}: {'/'.join(group)} are fused by vLLM and must share one format; "
                    f"found {got}"
                )


def _check_split(jobs: Mapping[str, Job], recipe: Recipe) -> None:
    for rule in recipe.modules:
        mine = [job for job in jobs.values() if job.format_name == rule.format]
        if rule.split and not any(len(job.choices) > 1 for job in mine):
            raise RecipeError(
                f"recipe {recipe.name!r}: split finds no other n for format {rule.format!r} that "
                "its matrices could be stored in; choose a smaller group_size or another m"
            )


def make_units(jobs: Mapping[str, Job], skeleton: Skeleton, source: Source) -> Iterator[Unit]:
    """Output files in order: every job and every tensor that none compresses, each in one."""
    compressed = {source.names[f"{module}.weight"] for module in jobs}
    drop_tied = skeleton.embedding in jobs and skeleton.tied
    groups: dict[int | None, list[str]] = {}
    parameter_of = {tensor: parameter for parameter, tensor in source.names.items()}
    for name in source.entries:
        parameter = parameter_of.get(name, name)
        module = parameter.removesuffix(".weight")
        if name in compressed or (drop_tied and module in skeleton.tied):
            continue
        key = -1 if module == skeleton.head and not skeleton.tied else skeleton.block_of(parameter)
        groups.setdefault(key, []).append(name)

    def unit(name: str, key: int | None, mine: list[Job]) -> Unit:
        return Unit(name, key, tuple(mine), tuple(groups.get(key, ())))

    by_block: dict[int | None, list[Job]] = {}
    for job in jobs.values():
        head = job.target.module == skeleton.head
        by_block.setdefault(-1 if head else skeleton.block_of(job.target.module), []).append(job)
    yield unit(EMBEDDINGS, None, by_block.get(None, []))
    for i in range(len(skeleton.blocks)):
        yield unit(f"block-{i:05d}", i, by_block.get(i, []))
    if by_block.get(-1) or groups.get(-1):
        yield unit(HEAD, -1, by_block.get(-1, []))


def _rules(jobs: list[Job], targets: tuple[str, ...]) -> list[Rule]:
    """As few rules as say it: block indices become \\d+ where that matches nothing else."""
    everything = {job.target.module: job for job in jobs}
    rules: dict[tuple[str, str, tuple[int, int]], None] = {}
    for job in jobs:
        name, shape = job.target.module, (job.target.rows, job.target.cols)
        pattern = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        same = [everything.get(n) for n in targets if re.fullmatch(pattern, n)]
        alike = all(
            j and (j.format_name, j.target.rows, j.target.cols) == (job.format_name, *shape)
            for j in same
        )
        match = f"re:{pattern}" if alike and len(same) > 1 else name
        rules[match, job.format_name, shape] = None
    return [Rule(*key) for key in sorted(rules, key=lambda k: k[0].startswith("re:"))]

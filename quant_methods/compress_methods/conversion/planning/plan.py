"""What a conversion will do, decided before any work: which module gets which format from which
algorithm, which file holds what, and how many bytes come out.

A shard is one output file: embeddings (and everything else outside the blocks), one per block, and
the head. Everything a recipe can get wrong about a model is found here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from compress_methods.algorithms import Algorithm
from compress_methods.algorithms.statistics import compares
from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.quantization_config import CompressionSpec, Rule
from compress_methods.checkpoint.source import Source
from compress_methods.conversion.planning.candidates import (
    Allowance,
    Found,
    allowance,
    around,
    check_candidates,
    find_formats,
    tie,
)
from compress_methods.conversion.planning.fit import Unfit, kept, refuse
from compress_methods.conversion.planning.kv_cache import KV_SHARD, STALE, kv_bytes, stale_scales
from compress_methods.errors import RecipeError
from compress_methods.formats import Format, TensorSpec
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import Sparse
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.recipe.schema import ModuleRule, Recipe

EMBEDDINGS, HEAD = "embeddings", "head"
HEAD_BLOCK = -1
"""`Shard.block` of the head, which comes after the last block."""


@dataclass(frozen=True)
class Job:
    """One matrix to compress. `choices`: formats that `passes/allocation.py` is to choose from,
    `variants` tell them apart: n of an allocated sparse format, else names. `regrouped`: why its
    groups are smaller than the recipe's, empty where they are not."""

    slot: Slot
    format_name: str
    format: Format
    algorithm: Algorithm
    choices: tuple[Format, ...] = ()
    regrouped: str = ""
    variants: tuple[int | str, ...] = ()

    @property
    def open(self) -> bool:
        """Whether a budget decides on the format."""
        return any(isinstance(variant, str) for variant in self.variants)

    def choice(self, variant: int | str) -> Format:
        return self.choices[self.variants.index(variant)]

    def nbytes(self, fmt: Format) -> int:
        """Bytes of the matrix in a format."""
        return fmt.nbytes(self.slot.rows, self.slot.cols)

    def decided(self, fmt: Format, formats: Mapping[str, Format]) -> Job:
        """With one of its choices; `formats` are the recipe's. What an allocation changes is named
        after the recipe's format and n, such as `s50-n48`."""
        if fmt == self.format:
            return self
        variant = self.variants[self.choices.index(fmt)]
        name = variant if isinstance(variant, str) else f"{self.format_name}-n{variant}"
        why = "" if name in formats else self.regrouped
        return dataclasses.replace(self, format=fmt, format_name=name, regrouped=why)

    def specs(self, layout: Layout) -> dict[str, TensorSpec]:
        """Checkpoint tensors by their full names."""
        slot = self.slot
        return layout.specs(slot.module, self.format, slot.rows, slot.cols)


@dataclass(frozen=True)
class Shard:
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
    """Everything decided: shards in order, `dropped` original tensors with the reason, `renamed`
    ones that are stored under another name; `tied` modules stored as another one, by its name.

    Where a budget leaves formats open, `compressed_bytes` is the most that can come out. `ways`:
    ranks that its matrices can be cut for."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    dropped: dict[str, str]
    original_bytes: int
    compressed_bytes: int
    tied: dict[str, str]
    embedding: str
    slots: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    layout: Layout = OWN
    allowance: Allowance = field(default_factory=Allowance)
    ways: int = 1

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed matrices."""
        return sum(spec.nbytes for job in self.jobs for spec in job.specs(self.layout).values())

    @property
    def needs_calibration(self) -> bool:
        return self.recipe.kv_cache is not None or any(
            job.choices or job.algorithm.needs(job.format) for job in self.jobs
        )

    def decided(self, formats: Mapping[str, Format]) -> Plan:
        """The plan with other formats for some modules, and the exact bytes that come out."""

        def changed(job: Job) -> Job:
            fmt = formats.get(job.slot.module, job.format)
            return job.decided(fmt, self.recipe.formats)

        shards = tuple(
            dataclasses.replace(shard, jobs=tuple(changed(job) for job in shard.jobs))
            for shard in self.shards
        )
        other = dataclasses.replace(self, shards=shards, allowance=Allowance())
        besides = self.compressed_bytes - self.packed_bytes - self.allowance.reserved
        return dataclasses.replace(other, compressed_bytes=besides + other.packed_bytes)

    @property
    def needs_original(self) -> bool:
        """Whether the result is compared with the original on its way: its inputs, or its blocks'
        outputs."""
        return any(
            compares(job.algorithm.needs(job.format)) or job.algorithm.refinement is not None
            for job in self.jobs
        )

    def compression_spec(self, base_model: str, tool_version: str) -> CompressionSpec:
        """The `quantization_config` of the result."""
        used = {job.format_name: job.format for job in self.jobs}
        return CompressionSpec(
            formats=used,
            modules=_rules(self.jobs, self.slots),
            embedding=self.embedding,
            tied=self.tied,
            base_model=base_model,
            recipe_sha256=self.recipe.sha256,
            tool_version=tool_version,
            kv_cache=self.recipe.kv_cache,
        )


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    source: Source,
    tensor_parallel_size: int = 1,
    aliases: Mapping[str, str] | None = None,
    layout: Layout = OWN,
    packs_dense: bool = False,
) -> Plan:
    """Decide everything; `RecipeError` where recipe and model do not fit, or a matrix cannot be
    cut for that many ranks. `aliases`: matrices stored as another one is. `packs_dense`: whether a
    rule for format `dense` packs a matrix, so that it can be shared; else it leaves it as it is."""
    listed, left = _jobs(recipe, skeleton, tensor_parallel_size, layout, packs_dense)
    recipe = dataclasses.replace(recipe, unfit={**recipe.unfit, **left})
    found = tie({job.slot.module: job for job in listed}, skeleton.architecture, recipe.formats)
    aliases = {a: o for a, o in (aliases or {}).items() if a in found and o in found}
    jobs = {module: job for module, job in found.items() if module not in aliases}
    if not jobs:
        first, why = next(iter(left.items()), ("", ""))
        raise RecipeError(
            f"recipe {recipe.name!r} matches no module of {source.name}"
            + (f" that fits; {first}: {why}" if left else "")
        )
    _check_fused(found, skeleton)
    _check_allocation(jobs, recipe)
    _check_whole(found, skeleton, source)
    scales = kv_bytes(recipe, skeleton, layout)
    shards = tuple(make_shards(jobs, skeleton, source, aliases))
    shards += (Shard(KV_SHARD, None, (), ()),) if scales else ()
    copied = {name for shard in shards for name in shard.copies}
    used = {source.tensor_of(job.slot) for job in jobs.values()}
    dropped = {
        source.tensor_of(found[alias].slot): f"shared with {owner}, stored once"
        for alias, owner in aliases.items()
    }
    dropped |= dict.fromkeys(stale_scales(source.entries, skeleton), STALE)
    for name in source.entries:
        if name not in copied and name not in used and name not in dropped:
            dropped[name] = "tied to the embedding, stored once"
    kept_bytes = sum(source.entries[name].nbytes for name in copied)
    total = sum(s.nbytes for job in jobs.values() for s in job.specs(layout).values())
    allowed = allowance(recipe, jobs, kept_bytes, source.nbytes)
    return Plan(
        recipe,
        shards,
        dropped,
        source.nbytes,
        total + kept_bytes + scales + allowed.reserved,
        {**skeleton.tied, **aliases},
        skeleton.embedding,
        tuple(skeleton.slots),
        layout=layout,
        allowance=allowed,
        ways=tensor_parallel_size,
    )


def _jobs(
    recipe: Recipe, skeleton: Skeleton, ways: int, layout: Layout, packs_dense: bool
) -> tuple[list[Job], dict[str, str]]:
    """The matrices to pack, and those that a rule keeps because they do not fit, with the reason;
    `RecipeError` naming all that a rule does not."""
    jobs, unfit = [], []
    unused = list(recipe.modules)
    for slot in skeleton.slots.values():
        rule = _rule_for(recipe, slot)
        if rule is None:
            continue
        if rule in unused:
            unused.remove(rule)
        fmt = recipe.formats[rule.format]
        if rule.candidates:
            check_candidates(rule, slot, recipe, layout)
        elif isinstance(fmt, Dense) and not packs_dense:
            continue
        if slot.kind == "embedding" and rule.algorithm.needs(fmt):
            raise RecipeError(
                f"{slot.module}: algorithm {rule.algorithm.name!r} needs the inputs of a linear "
                "layer, a token table has none; use rtn for it"
            )
        if rule.algorithm.blocks_only and slot.kind not in ("blocks", "experts"):
            raise RecipeError(
                f"{slot.module}: algorithm {rule.algorithm.name!r} trains the matrices of a "
                "decoder block together; use another one for what lies outside the blocks"
            )
        if rule.algorithm.loss_groups and slot.index:
            raise RecipeError(
                f"{slot.module}: loss_groups needs the outputs of a layer, but this is one matrix "
                f"of several in {slot.parameter}; set loss_groups: 0 for it"
            )
        found = find_formats(rule, slot, recipe, ways, skeleton, layout)
        if not found.formats:
            unfit.append(Unfit(slot, rule.format, found.why, rule.on_unfit == "keep"))
            continue
        jobs.append(_job(slot, rule, found, ways, skeleton))
    refuse(unfit)
    for rule in unused:
        if rule.match == ("lm_head",) and skeleton.tied:
            continue
        raise RecipeError(
            f"recipe {recipe.name!r}: match {', '.join(rule.match)} finds no module "
            "that an earlier rule has left"
        )
    left = kept(unfit, skeleton)
    return [job for job in jobs if job.slot.module not in left], left


def _job(slot: Slot, rule: ModuleRule, found: Found, ways: int, skeleton: Skeleton) -> Job:
    """In the first format that was found, the others to choose from."""
    name, fmt = next(iter(found.formats.items()))
    choices: tuple[Format, ...] = ()
    variants: tuple[int | str, ...] = ()
    if rule.candidates:
        choices, variants = tuple(found.formats.values()), tuple(found.formats)
    elif rule.allocate and isinstance(fmt, Sparse) and slot.kind == "blocks":
        allocated = tuple(around(fmt, slot, ways, skeleton))
        choices, variants = allocated, tuple(each.n for each in allocated)
    return Job(slot, name, fmt, rule.algorithm, choices, found.why, variants)


def _rule_for(recipe: Recipe, slot: Slot) -> ModuleRule | None:
    return next((r for r in recipe.modules if r.matches(slot.module, slot.kind)), None)


def _check_fused(jobs: Mapping[str, Job], skeleton: Skeleton) -> None:
    """vLLM runs these siblings as one matrix, so they must share a format."""
    for module in skeleton.slots:
        parent, _, leaf = module.rpartition(".")
        group = skeleton.architecture.group(leaf)
        if len(group) == 1 or leaf != group[0]:
            continue
        found = {
            part: jobs[f"{parent}.{part}"].format_name if f"{parent}.{part}" in jobs else "dense"
            for part in group
            if f"{parent}.{part}" in skeleton.slots
        }
        if len(set(found.values())) > 1:
            got = ", ".join(f"{part}: {fmt}" for part, fmt in found.items())
            raise RecipeError(
                f"{parent}: {'/'.join(group)} are fused by vLLM and must share one format; "
                f"found {got}"
            )


def _check_whole(jobs: Mapping[str, Job], skeleton: Skeleton, source: Source) -> None:
    """Of a tensor that holds several matrices all must be packed, or none."""
    for slot in skeleton.slots.values():
        if slot.index and slot.parameter not in source.parts and slot.module not in jobs:
            packed = next((j for j in jobs.values() if j.slot.parameter == slot.parameter), None)
            if packed is not None:
                raise RecipeError(
                    f"{slot.module} is kept, but {packed.slot.module} is packed; "
                    f"{source.tensor_of(slot)} holds both, so they must go together"
                )


def _check_allocation(jobs: Mapping[str, Job], recipe: Recipe) -> None:
    for rule in recipe.modules:
        mine = [job for job in jobs.values() if job.format_name == rule.format]
        if rule.allocate and not any(len(job.choices) > 1 for job in mine):
            raise RecipeError(
                f"recipe {recipe.name!r}: allocate finds no other n for format {rule.format!r} "
                "that its matrices could be stored in; choose a smaller group_size or another m"
            )


def make_shards(
    jobs: Mapping[str, Job],
    skeleton: Skeleton,
    source: Source,
    aliases: Mapping[str, str] | None = None,
) -> Iterator[Shard]:
    """Output files in order: every job and every tensor that none compresses, each in one."""
    compressed = {source.tensor_of(job.slot) for job in jobs.values()}
    compressed |= {source.tensor_of(skeleton.slots[alias]) for alias in aliases or {}}
    drop_tied = skeleton.embedding in jobs and skeleton.tied
    groups: dict[int | None, list[str]] = {}
    parameter_of = {tensor: parameter for parameter, tensor in source.names.items()}
    stale = set(stale_scales(source.entries, skeleton))
    for name in (name for name in source.entries if name not in stale):
        parameter = parameter_of.get(name, name)
        module = parameter.removesuffix(".weight")
        if name in compressed or (drop_tied and module in skeleton.tied):
            continue
        key = -1 if module == skeleton.head and not skeleton.tied else skeleton.block_of(parameter)
        groups.setdefault(key, []).append(name)

    def shard(name: str, key: int | None, mine: list[Job]) -> Shard:
        return Shard(name, key, tuple(mine), tuple(groups.get(key, ())))

    by_block: dict[int | None, list[Job]] = {}
    for job in jobs.values():
        head = job.slot.module == skeleton.head
        by_block.setdefault(-1 if head else skeleton.block_of(job.slot.module), []).append(job)
    yield shard(EMBEDDINGS, None, by_block.get(None, []))
    for i in range(len(skeleton.blocks)):
        yield shard(f"block-{i:05d}", i, by_block.get(i, []))
    if by_block.get(-1) or groups.get(-1):
        yield shard(HEAD, -1, by_block.get(-1, []))


def _rules(jobs: list[Job], modules: tuple[str, ...]) -> list[Rule]:
    """As few rules as say it: block indices become \\d+ where that matches nothing else."""
    everything = {job.slot.module: job for job in jobs}
    rules: dict[tuple[str, str, tuple[int, int]], None] = {}
    alike_names: dict[str, list[str]] = {}
    for module in modules:  # a mixture has tens of thousands, of few patterns
        alike_names.setdefault(_pattern(module), []).append(module)
    for job in jobs:
        name, shape = job.slot.module, (job.slot.rows, job.slot.cols)
        pattern = _pattern(name)
        same = [everything.get(n) for n in alike_names[pattern]]
        alike = all(
            j and (j.format_name, j.slot.rows, j.slot.cols) == (job.format_name, *shape)
            for j in same
        )
        match = f"re:{pattern}" if alike and len(same) > 1 else name
        rules[match, job.format_name, shape] = None
    return [Rule(*key) for key in sorted(rules, key=lambda k: k[0].startswith("re:"))]


def _pattern(name: str) -> str:
    """What matches a module's name with any numbers in it."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))

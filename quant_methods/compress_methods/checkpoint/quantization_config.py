"""The `quantization_config` block of a compressed checkpoint's config.json: written by `convert`,
read by the plugin, `check`, `inspect` and `load_model`.

    {"quant_method": "vllm_compress", "version": 1,
     "formats": {"w4": {"format": "integer", "bits": 4, ...}},
     "modules": [{"match": "re:model\\.layers\\.\\d+\\.mlp\\.up_proj", "format": "w4",
                  "shape": [8192, 2048]}],
     "embedding": "model.embed_tokens", "tied": {"lm_head": "model.embed_tokens"},
     "base_model": "...", "recipe_sha256": "...", "tool_version": "..."}

First match wins, in full, on the Hugging Face module name; no match means the module is kept as it
is. `kv_cache: fp8`, where it is there, says that attention layers have scales for such a cache.
`shape` is [rows, cols] = [outputs, inputs] of every module the rule matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress_methods.errors import CheckpointError, FormatError, nearest
from compress_methods.formats import Format, format_from_dict
from compress_methods.names import QUANT_METHOD as QUANT_METHOD
from compress_methods.system.pattern import PatternError, compile_pattern, matches_whole

VERSION = 1
KEYS = (
    "quant_method",
    "version",
    "formats",
    "modules",
    "embedding",
    "tied",
    "base_model",
    "recipe_sha256",
    "tool_version",
    "kv_cache",
)
KV_CACHES = ("fp8",)
"""What a cache of keys and values may have scales for."""


@dataclass(frozen=True)
class Rule:
    """Modules that `match` names (literally, or as a regular expression after `re:`)."""

    match: str
    format: str
    shape: tuple[int, int] | None = None

    def matches(self, module: str) -> bool:
        if self.match.startswith("re:"):
            return matches_whole(self.match[3:], module)
        return module == self.match


@dataclass
class CompressionSpec:
    """A parsed `quantization_config`: plain, picklable data."""

    formats: dict[str, Format]
    modules: list[Rule]
    embedding: str | None = None
    tied: dict[str, str] = field(default_factory=dict)
    base_model: str = ""
    recipe_sha256: str = ""
    tool_version: str = ""
    kv_cache: str | None = None

    def rule_for(self, module: str) -> Rule | None:
        """The first rule that matches a module, tied modules answering as their owner."""
        owner = self.tied.get(module, module)
        return next((rule for rule in self.modules if rule.matches(owner)), None)

    def format_for(self, module: str) -> Format | None:
        """Format of a Hugging Face module name; None where it is kept as it is."""
        rule = self.rule_for(module)
        return None if rule is None else self.formats[rule.format]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "formats": {name: fmt.to_dict() for name, fmt in self.formats.items()},
            "modules": [
                {"match": r.match, "format": r.format, "shape": list(r.shape or ())}
                for r in self.modules
            ],
            "embedding": self.embedding,
            "tied": self.tied,
            "base_model": self.base_model,
            "recipe_sha256": self.recipe_sha256,
            "tool_version": self.tool_version,
            **({} if self.kv_cache is None else {"kv_cache": self.kv_cache}),
        }


def parse(block: Any, where: str = "quantization_config") -> CompressionSpec:
    """Validated form of the JSON block; raises `CheckpointError` naming the key at fault."""
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{where}: expected a mapping, found {type(block).__name__}")
    if block.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: quant_method is {block.get('quant_method')!r}, expected {QUANT_METHOD!r}"
        )
    version = block.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{where}: version is {version!r}, expected an integer from 1")
    if version > VERSION:
        raise CheckpointError(
            f"{where}: version is {version}, this vllm-compress reads up to {VERSION}; upgrade it"
        )
    for key in block:
        if key not in KEYS:
            raise CheckpointError(f"{where}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    formats = _formats(block.get("formats"), where)
    tied = block.get("tied") or {}
    embedding = block.get("embedding")
    if not isinstance(tied, Mapping) or not all(isinstance(v, str) for v in tied.values()):
        raise CheckpointError(f"{where}: tied is {tied!r}, expected a mapping of module names")
    kv_cache = block.get("kv_cache")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        raise CheckpointError(
            f"{where}: kv_cache is {kv_cache!r}, expected {' or '.join(KV_CACHES)}"
        )
    if embedding is not None and not isinstance(embedding, str):
        raise CheckpointError(f"{where}: embedding is {embedding!r}, expected a module name")
    return CompressionSpec(
        formats=formats,
        modules=_rules(block.get("modules"), formats, where),
        embedding=embedding,
        tied=dict(tied),
        base_model=str(block.get("base_model", "")),
        recipe_sha256=str(block.get("recipe_sha256", "")),
        tool_version=str(block.get("tool_version", "")),
        kv_cache=kv_cache,
    )


def _formats(block: Any, where: str) -> dict[str, Format]:
    if not isinstance(block, Mapping) or not block:
        raise CheckpointError(f"{where}: formats is {block!r}, expected a non-empty mapping")
    try:
        return {
            str(name): format_from_dict(spec, f"{where}: formats.{name}")
            for name, spec in block.items()
        }
    except FormatError as problem:
        raise CheckpointError(str(problem)) from problem


def _rules(block: Any, formats: Mapping[str, Format], where: str) -> list[Rule]:
    if not isinstance(block, list):
        raise CheckpointError(f"{where}: modules is {block!r}, expected a list")
    rules = []
    for i, entry in enumerate(block):
        at = f"{where}: modules[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("match"), str):
            raise CheckpointError(f"{at}: expected a mapping with a text 'match', found {entry!r}")
        if not isinstance(entry.get("format"), str) or entry["format"] not in formats:
            raise CheckpointError(
                f"{at}: unknown format {entry.get('format')!r}; "
                f"{nearest(str(entry.get('format')), formats)}"
            )
        shape = entry.get("shape") or None
        if shape is not None and not (
            isinstance(shape, (list, tuple))
            and len(shape) == 2
            and all(isinstance(n, int) for n in shape)
        ):
            raise CheckpointError(f"{at}: shape is {shape!r}, expected [rows, cols]")
        try:
            if entry["match"].startswith("re:"):
                compile_pattern(entry["match"].removeprefix("re:"))
        except PatternError as problem:
            raise CheckpointError(f"{at}: match {entry['match'][:200]!r}: {problem}") from problem
        rules.append(Rule(entry["match"], entry["format"], tuple(shape) if shape else None))
    return rules

"""Calibration text that the model writes itself, when the user gives none.

The data-free calibration of LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 2.1): a first token
drawn at random, the next few the likeliest ones, the rest sampled from the whole distribution.
Under a preset (`presets.py`) rows begin with prompts, and all that the model adds is sampled.

Needs memory for the output head, one block and `CACHE_BYTES` of keys and values: blocks are read
again for every token of every batch, from the page cache. Fails where the checkpoint does not fit
there, since every token would then wait for the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.calibration.presets import OPEN, Turns, is_scripted, open_script
from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.tokenizer import check_length, leading_bos
from compress_methods.checkpoint.integrity import read_checked, write_checked
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.checkpoint.source import Source
from compress_methods.errors import CalibrationError
from compress_methods.model.block_runner import move_buffers
from compress_methods.model.skeleton import Skeleton, set_parameter
from compress_methods.system.memory import available_bytes
from compress_methods.system.progress import Progress
from compress_methods.system.words import size_text

GREEDY_TOKENS = 4
MAX_BATCH = 128
CACHE_BYTES = 5 * 2**28
RESIDENT_BYTES = 2**28
FLOAT = 4
TOKENS = "tokens"


def sample_from_model(
    source: Source,
    tokenizer: Any,
    settings: CalibrationSettings,
    progress: Progress | None = None,
    kept: Path | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """int64 [samples + held_out, length] of text the model writes itself, computed in float32.

    `progress` counts generated tokens; its total is set here. Batches are written to `kept` as they
    are finished, and a file found there is continued. The same model, settings and library versions
    give the same tokens, whatever the batch size up to rounding. Raises `CalibrationError` where
    the model takes no such length or would be read from disk for every token.
    """
    check_length(source.directory, settings.length)
    require_cached(source)
    skeleton = open_skeleton(source.directory)
    place = device or torch.device("cpu")
    stream_weights(skeleton, source, place)
    config = skeleton.model.config.get_text_config()
    banned = _banned_tokens(tokenizer, config.vocab_size)
    generator = torch.Generator().manual_seed(settings.seed)
    script = None
    if is_scripted(settings.preset):
        script = open_script(source.directory, tokenizer, settings)
        start = script.start(settings.rows)
        banned[script.ends] = False
    else:
        start = _first_tokens(banned, settings.rows, generator)[:, None]
        bos = leading_bos(tokenizer)
        if bos is not None:
            start = nn.functional.pad(start, (1, 0), value=bos)
    draws = torch.rand(settings.rows, settings.length, generator=generator)
    found = None if kept is None else read_checked(kept)
    parts = [] if found is None else [found[TOKENS]]
    done = sum(map(len, parts))
    if progress is not None:
        progress.total = settings.rows * settings.length
        progress.skip(done * settings.length)
    batch = batch_rows(config, settings)
    for first in range(done, settings.rows, batch):
        rows = slice(first, first + batch)
        inputs = (start[rows].to(place), draws[rows].to(place), banned.to(place))
        turns = None if script is None else Turns(script, range(settings.rows)[rows])
        parts.append(_generate(skeleton.model, *inputs, progress, turns).cpu())
        if kept is not None:
            write_checked(kept, {TOKENS: torch.cat(parts)})
    return torch.cat(parts)


def require_cached(source: Source) -> None:
    """`CalibrationError` where the checkpoint is larger than the memory that could cache it."""
    free = available_bytes()
    if source.nbytes > 0.9 * free:
        raise CalibrationError(
            f"{source.directory.name}: {size_text(source.nbytes)} of weights do not fit "
            f"{size_text(free)} of free memory and would be read from disk for every token the "
            "model writes; give --calibration FILE"
        )


def batch_rows(config: Any, settings: CalibrationSettings) -> int:
    """Sequences generated together: equal batches with keys and values in `CACHE_BYTES`."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:  # Mamba keeps a state of fixed size: a few times the width, of every layer
        state = 4 * config.num_hidden_layers * config.hidden_size * FLOAT
        sequence = state * max(1, getattr(config, "state_size", 1))
    else:
        heads = getattr(config, "num_key_value_heads", None) or queries
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        sequence = 2 * config.num_hidden_layers * heads * size * FLOAT * settings.length
    most = max(1, min(MAX_BATCH, CACHE_BYTES // sequence))
    return math.ceil(settings.rows / math.ceil(settings.rows / most))


def stream_weights(skeleton: Skeleton, source: Source, device: torch.device | None = None) -> None:
    """Let the skeleton's model run whole, each block's weights read in float32 when it is called.

    They share one set of buffers, or stay where all together take at most `RESIDENT_BYTES`.
    Of a token table that is not also the output head only the rows asked for are read.
    """
    model, place = skeleton.model, device or torch.device("cpu")
    if place.type != "cpu":
        move_buffers(model, place)
    table = f"{skeleton.embedding}.weight"
    blocks: list[list[str]] = [[] for _ in skeleton.blocks]
    shapes = skeleton.parameter_names()
    for name in shapes:
        index = skeleton.block_of(name)
        if index is not None:
            blocks[index].append(name)
        elif name != table or skeleton.tied:
            set_parameter(model, name, source.read_float(name).to(place))
    model.tie_weights()
    if not skeleton.tied:
        _stream_rows(skeleton.module(skeleton.embedding), source.entry(table), place)
    names = [name for block in blocks for name in block]
    if sum(FLOAT * math.prod(shapes[name]) for name in names) <= RESIDENT_BYTES:
        for name in names:
            set_parameter(model, name, source.read_float(name).to(place))
        return
    buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for index, block in enumerate(blocks):
        _stream_block(skeleton, index, {n: shapes[n] for n in block}, source, buffers, place)


def _stream_block(
    skeleton: Skeleton,
    index: int,
    shapes: Mapping[str, tuple[int, ...]],
    source: Source,
    buffers: dict[tuple[str, tuple[int, ...]], Tensor],
    device: torch.device,
) -> None:
    """Read a block's parameters before each call, into buffers shared with blocks like it."""
    checked: set[str] = set()
    prefix = f"{skeleton.blocks_name}.{index}."

    def fill(*_: Any) -> None:
        for name, shape in shapes.items():
            key = (name.removeprefix(prefix), tuple(shape))
            buffers[key] = source.read_float(name, buffers.get(key), known=name in checked)
            checked.add(name)
            set_parameter(skeleton.model, name, buffers[key].to(device))

    skeleton.blocks[index].register_forward_pre_hook(fill)


def _stream_rows(embedding: Any, entry: Entry, device: torch.device) -> None:
    """Make an embedding read the rows it is asked for, and no others."""
    embedding.padding_idx = None

    def fetch(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows, local = inputs[0].unique(return_inverse=True)
        found = torch.cat([entry.read(row, 1) for row in rows.tolist()])
        value = found.to(device).float()
        module._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        return (local,)

    embedding.register_forward_pre_hook(fetch)


def _banned_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """bool [vocab]: special tokens, and the rows of a padded vocabulary that no token has."""
    banned = torch.ones(vocabulary, dtype=torch.bool)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [i for i in tokenizer.get_vocab().values() if i < vocabulary and i not in special]
    banned[known] = False
    return banned


def _first_tokens(banned: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """`rows` random tokens, all different where the vocabulary has as many."""
    allowed = (~banned).nonzero().flatten()
    rounds = -(-rows // len(allowed))
    orders = [torch.randperm(len(allowed), generator=generator) for _ in range(rounds)]
    return allowed[torch.cat(orders)[:rows]]


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """int64 [batch, 1]: of each distribution [batch, vocab] what a uniform draw [batch] falls on,
    by inverting the cumulative distribution."""
    cumulative = probabilities.double().cumsum(-1)
    at = draws[:, None].double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)


@torch.inference_mode()
def _generate(
    model: Any,
    start: Tensor,
    draws: Tensor,
    banned: Tensor,
    progress: Progress | None,
    turns: Turns | None = None,
) -> Tensor:
    """Continue `start` [batch, n], `OPEN` behind shorter rows, to [batch, length] with one uniform
    draw per token.

    Sampling inverts the cumulative distribution at the draw, so a row does not depend on the rows
    it is batched with. What is given at a place is taken instead of what the model would say.
    """
    length = draws.shape[1]
    tokens = torch.full((len(start), length), OPEN, device=start.device)
    tokens[:, : start.shape[1]] = start
    known = int((start != OPEN).all(0).long().cumprod(0).sum())
    greedy = known + GREEDY_TOKENS if turns is None else 0
    cache, new = None, tokens[:, :known]
    for position in range(known, length):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float().masked_fill(banned, -torch.inf)
        if position < greedy:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = drawn(logits.softmax(-1), draws[:, position])
        free = tokens[:, position] == OPEN
        new = torch.where(free[:, None], new, tokens[:, position, None])
        tokens[:, position] = new[:, 0]
        if turns is not None:
            turns.follow(tokens, position, free)
        if progress is not None:
            progress.step(len(start))
    if progress is not None:
        progress.step(len(start) * known)
    return tokens

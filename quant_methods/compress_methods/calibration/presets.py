"""Prompts under which a model writes its calibration text, instead of behind a random token.

    configs/prompts/chat.yaml, code.yaml, long.yaml
        system   what a conversation may begin with, where the chat template takes it
        asked    what a user asks; a model with a chat template answers it
        begun    how a text begins; a model without one goes on with it

Prompts come in an order drawn from the seed; those of held-out sequences are others than those of
the rest. A row begins with a prompt. Where the model ends its answer, the row goes on with the next
prompt, as packed conversations do; under `long` the end is kept from it, so that one text fills the
row. Prompts longer than half a sequence are left out; fails where few remain. A model that knows no
chats or code writes text of its own kind under them all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.chat import has_template, render
from compress_methods.calibration.rows import Chat
from compress_methods.calibration.settings import PLAIN, CalibrationSettings
from compress_methods.calibration.text import encode
from compress_methods.calibration.tokenizer import leading_bos
from compress_methods.checkpoint.compressed import read_json
from compress_methods.errors import CalibrationError
from compress_methods.system.resources import config_path
from compress_methods.system.user_file import read_yaml

OPEN = -1
"""In a row of tokens: to be written by the model."""
ENDLESS = "long"
HELD_OUT_SHARE = 6


@dataclass(frozen=True)
class Script:
    """The prompts of a preset as token ids; rows before `held_from` share `order`, the others
    `held_order`. `ends`: tokens that end an answer. `lead`: what a row starts with."""

    prompts: tuple[list[int], ...]
    order: list[int]
    held_order: list[int]
    held_from: int
    ends: list[int]
    lead: list[int]

    def prompt(self, row: int, turn: int) -> list[int]:
        """The prompt with number `turn`, from 0, of a row."""
        order = self.order if row < self.held_from else self.held_order
        ids = self.prompts[order[(row + turn) % len(order)]]
        return ids if turn else self.lead + ids

    def start(self, rows: int) -> Tensor:
        """int64 [rows, longest]: the first prompts, `OPEN` behind shorter ones."""
        first = [self.prompt(row, 0) for row in range(rows)]
        found = torch.full((rows, max(map(len, first))), OPEN)
        for row, ids in enumerate(first):
            found[row, : len(ids)] = torch.tensor(ids)
        return found


class Turns:
    """The prompts of some rows of a script, one after another as answers end."""

    def __init__(self, script: Script, rows: Sequence[int]) -> None:
        self.script, self.rows = script, rows
        self.turns = [0] * len(rows)

    def follow(self, tokens: Tensor, position: int, written: Tensor) -> None:
        """Put the next prompt behind every row of tokens [rows, length] where the model itself
        (`written`, bool [rows]) has ended its answer at `position`."""
        ends = torch.tensor(self.script.ends, dtype=tokens.dtype, device=tokens.device)
        ended = torch.isin(tokens[:, position], ends) & written
        for i in ended.nonzero().flatten().tolist():
            self.turns[i] += 1
            ids = self.script.prompt(self.rows[i], self.turns[i])
            room = tokens[i, position + 1 :]
            room[: len(ids)] = torch.tensor(ids[: len(room)], device=tokens.device)


def is_scripted(preset: str) -> bool:
    """Whether a preset has prompts."""
    return preset not in ("", PLAIN)


def open_script(directory: Path, tokenizer: Any, settings: CalibrationSettings) -> Script:
    """The prompts of `settings.preset` as a model takes them; `CalibrationError` where sequences
    are too short for most."""
    preset = settings.preset
    texts = _texts(read_prompts(preset), tokenizer)
    bos = leading_bos(tokenizer)
    lead = [] if bos is None else [bos]
    every = [encode(tokenizer, text) for text in texts]
    prompts = tuple(ids for ids in every if 2 * (len(lead) + len(ids)) <= settings.length)
    if len(prompts) < HELD_OUT_SHARE:
        raise CalibrationError(
            f"length is {settings.length}, but only {len(prompts)} of {len(every)} prompts of "
            f"self:{preset} take at most half of it, expected {HELD_OUT_SHARE}; give a larger one"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held = max(1, len(order) // HELD_OUT_SHARE)
    ends = [] if preset == ENDLESS else end_tokens(directory, tokenizer)
    return Script(prompts, order[held:], order[:held], settings.samples, ends, lead)


def end_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Ids with which a model ends what it says."""
    file = directory / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = found if isinstance(found, list) else [found]
    every = {i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}
    return sorted(i for i in every if i < len(tokenizer))


def preset_identity(preset: str) -> str:
    """A preset's name and prompts, for fingerprints."""
    digest = hashlib.sha256(_path(preset).read_bytes()).hexdigest()
    return f"{preset} {digest}"


def preset_name(preset: str) -> str:
    """What the calibration data were, for reports."""
    return f"sampled from the model itself, preset {preset}"


def _path(preset: str) -> Path:
    return config_path("prompts", f"{preset}.yaml")


def read_prompts(preset: str) -> Mapping[str, list[str]]:
    found = read_yaml(_path(preset), CalibrationError)
    assert isinstance(found, Mapping)
    return found


def _texts(found: Mapping[str, list[str]], tokenizer: Any) -> list[str]:
    """Prompts as texts: rendered, with every third a system message, or beginnings."""
    if not has_template(tokenizer):
        return found["begun"]
    system = found.get("system") or []
    texts = []
    for number, asked in enumerate(found["asked"]):
        messages = [{"role": "user", "content": asked}]
        if system and number % 3 == 0:
            said = system[number // 3 % len(system)]
            texts.append(_with_system(said, messages, tokenizer))
        else:
            texts.append(render(Chat(messages), "prompts", tokenizer, prompt=True))
    return texts


def _with_system(said: str, messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """A prompt behind a system message, or without where the template takes none."""
    try:
        chat = Chat([{"role": "system", "content": said}, *messages])
        return render(chat, "prompts", tokenizer, prompt=True)
    except CalibrationError:
        return render(Chat(messages), "prompts", tokenizer, prompt=True)

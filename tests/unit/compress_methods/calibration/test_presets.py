"""Under a preset the model answers prompts: other ones in held-out rows, the next as one ends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.calibration import self_generated as sampling
from compress_methods.calibration.presets import (
    OPEN,
    Script,
    Turns,
    end_tokens,
    open_script,
    read_prompts,
)
from compress_methods.calibration.self_generated import sample_from_model
from compress_methods.calibration.settings import PLAIN, PRESETS, CalibrationSettings
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.errors import CalibrationError
from compress_methods.model.skeleton import build_skeleton
from compress_methods.system.progress import Progress

SCRIPTED = [preset for preset in PRESETS if preset != PLAIN]
GO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
END = 4


@pytest.fixture(scope="module")
def source(novels_8m: Path) -> Source:
    return open_source(novels_8m, build_skeleton(novels_8m), novels_8m.name, False)


def settings(preset: str, **changed: Any) -> CalibrationSettings:
    values = {"samples": 5, "length": 64, "held_out": 2, "preset": preset}
    return CalibrationSettings(**{**values, **changed})


@pytest.mark.parametrize("preset", SCRIPTED)
def test_there_are_dozens_of_prompts_all_different(preset: str, tokenizer: Any) -> None:
    found = read_prompts(preset)
    assert len(found["asked"]) >= 30
    assert len(found["begun"]) >= 18
    for key in ("asked", "begun", "system"):
        assert len(set(found[key])) == len(found[key])
        assert all(isinstance(text, str) and text for text in found[key])


@pytest.mark.parametrize("preset", SCRIPTED)
def test_rows_begin_with_prompts_that_held_out_rows_do_not_share(
    preset: str, source: Source, novels_8m: Path, tokenizer: Any
) -> None:
    chosen = settings(preset, samples=40, length=512, held_out=20)
    script = open_script(novels_8m, tokenizer, chosen)
    start = script.start(chosen.rows)
    firsts = [tuple(row[row != OPEN].tolist()) for row in start]
    seen, held = set(firsts[:40]), set(firsts[40:])
    assert len(seen) > 20
    assert len(held) >= 4
    assert not seen & held
    other = open_script(novels_8m, tokenizer, settings(preset, samples=40, length=512, seed=1))
    assert other.order != script.order


@pytest.mark.parametrize("preset", SCRIPTED)
def test_the_model_goes_on_from_its_prompts(
    preset: str, source: Source, novels_8m: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same whatever the batch, with progress, and unlike what it writes unasked."""
    chosen = settings(preset)
    progress = Progress(1, "sampling", quiet=True)
    tokens = sample_from_model(source, tokenizer, chosen, progress)
    assert tokens.shape == (7, 64)
    assert progress.done == progress.total == 7 * 64
    start = open_script(novels_8m, tokenizer, chosen).start(7)
    given = start != OPEN
    assert torch.equal(tokens[:, : start.shape[1]][given], start[given])
    assert (tokens >= 0).all()
    monkeypatch.setattr(sampling, "MAX_BATCH", 3)
    assert torch.equal(sample_from_model(source, tokenizer, chosen), tokens)
    if preset == "long":
        assert (tokens != 0).all()


def test_what_is_finished_is_kept(
    source: Source, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("chat")
    monkeypatch.setattr(sampling, "MAX_BATCH", 3)
    undisturbed = sample_from_model(source, tokenizer, chosen)
    generate, kept, calls = sampling._generate, tmp_path / "tokens.safetensors", []

    def generate_once(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(sampling, "_generate", generate_once)
    with pytest.raises(KeyboardInterrupt):
        sample_from_model(source, tokenizer, chosen, None, kept)
    assert torch.equal(sample_from_model(source, tokenizer, chosen, None, kept), undisturbed)
    assert len(calls) == 4


class Ending:
    """A model that says 3 until its own text is two tokens long, and then ends it."""

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.full((len(seen), 1, 8), -torch.inf)
        ends = (seen[:, -2:] == 3).all(1)
        logits[:, 0, 3] = torch.where(ends, -torch.inf, 0.0)
        logits[:, 0, END] = torch.where(ends, 0.0, -torch.inf)
        return type("Out", (), {"logits": logits, "past_key_values": seen})


def test_the_next_prompt_follows_an_answer() -> None:
    script = Script(([5], [6, 4, 6], [7]), [0, 1], [2], 2, [END], [1])
    start = script.start(3)
    assert start.tolist() == [[1, 5, OPEN, OPEN], [1, 6, 4, 6], [1, 7, OPEN, OPEN]]
    banned = torch.zeros(8, dtype=torch.bool)
    turns = Turns(script, range(3))
    tokens = sampling._generate(Ending(), start, torch.rand(3, 11), banned, None, turns)
    assert tokens.tolist() == [
        [1, 5, 3, 3, 4, 6, 4, 6, 3, 3, 4],
        [1, 6, 4, 6, 3, 3, 4, 5, 3, 3, 4],
        [1, 7, 3, 3, 4, 7, 3, 3, 4, 7, 3],
    ]
    short = sampling._generate(
        Ending(), start, torch.rand(3, 6), banned, None, Turns(script, range(3))
    )
    assert short.tolist() == [row[:6] for row in tokens.tolist()]


def test_answers_end_as_the_model_says(novels_8m: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    for written, expected in (("{}", [0]), ('{"eos_token_id": [9, 3]}', [0, 3, 9])):
        file.write_text(written)
        assert end_tokens(tmp_path, tokenizer) == expected
    file.write_text('{"eos_token_id": 999999}')
    assert end_tokens(tmp_path, tokenizer) == [0]
    assert open_script(novels_8m, tokenizer, settings("chat")).ends == [0]
    assert open_script(novels_8m, tokenizer, settings("long")).ends == []


def test_prompts_are_questions_with_a_template_and_beginnings_without(
    novels_8m: Path, tokenizer: Any, with_bos: Any
) -> None:
    some = copy.deepcopy(tokenizer)
    some.chat_template = GO
    script = open_script(novels_8m, some, settings("code", length=512))
    texts = [some.decode(ids) for ids in script.prompts]
    assert all(text.endswith("<assistant>") for text in texts)
    assert sum(text.startswith("<system>You") or "<system>Answer" in text for text in texts) == 12
    some.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + GO
    )
    texts = [
        some.decode(ids)
        for ids in open_script(novels_8m, some, settings("code", length=512)).prompts
    ]
    assert len(texts) == 36
    assert all(text.startswith("<user>") for text in texts)
    some.chat_template = None
    texts = [
        some.decode(ids)
        for ids in open_script(novels_8m, some, settings("code", length=512)).prompts
    ]
    assert texts == read_prompts("code")["begun"]
    bos = copy.deepcopy(with_bos)
    bos.chat_template = "{{ bos_token }}" + GO
    start = open_script(novels_8m, bos, settings("chat", length=512)).start(20)
    assert (start[:, 0] == 0).all()
    assert (start[:, 1] != 0).all()


def test_sequences_too_short_for_prompts_are_refused(novels_8m: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        open_script(novels_8m, tokenizer, settings("chat", length=16))
    assert str(caught.value) == (
        "length is 16, but only 0 of 36 prompts of self:chat take at most half of it, expected 6; "
        "give a larger one"
    )


def test_a_conversion_under_a_preset_says_so(novels_8m: Path, tmp_path: Path) -> None:
    """And measures on it, even where no algorithm needs text."""
    rule = {"match": "re:.*0.mlp.down_proj", "format": "w", "algorithm": "gptq"}
    block = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [rule],
        "calibration": {"samples": 2, "length": 64, "held_out": 1},
    }

    def run(name: str, calibration: str | None = None, **changed: Any) -> dict[str, Any]:
        return convert(
            novels_8m, {**block, **changed}, tmp_path / name, calibration=calibration, quiet=True
        )

    plain, again = run("plain"), run("plain", "self")
    assert plain["fingerprint"] == again["fingerprint"]
    assert plain["calibration"]["source"] == "sampled from the model itself"
    code = convert(
        novels_8m,
        {**block, "calibration": {**block["calibration"], "preset": "code"}},
        tmp_path / "code",
        quiet=True,
    )
    assert code["calibration"]["source"] == "sampled from the model itself, preset code"
    assert code["calibration"]["rendered"] == 3
    line = run("line", "self:code")
    weights = [
        (tmp_path / name / "block-00000.safetensors").read_bytes()
        for name in ("code", "line", "plain")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert len({r["fingerprint"] for r in (plain, code, line)}) == 3
    rtn = {**rule, "algorithm": "rtn"}
    assert run("rtn", modules=[rtn])["held_out"] is None
    assert run("rtn-code", "self:code", modules=[rtn])["held_out"]["tokens"] == 63

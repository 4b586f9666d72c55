"""Tiny random models of every architecture that this vLLM serves on a CPU: log-probabilities are
those that transformers computes with the stored values.

A kind of model is `proven` in the table of architectures because it is here, or in
`test_mixtures.py` or `test_encoders.py`, and only then.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.model.architecture import architecture_of, proven_types
from tests.e2e.support.encoders import ENCODERS
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import VOCABULARY, compress, make_model, reference
from tests.e2e.support.vision import VISION
from tests.e2e.support.zoo import MIXTURES, SERVED, SERVED_MIXTURES, UNSERVED, ZOO

W4 = {"format": "integer", "bits": 4, "group_size": 32}
WORST = 1e-3


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, VOCABULARY - 20) for _ in range(40)] for _ in range(2)]


def pack(name: str, directory: Path) -> Path:
    """A random model of a kind, its blocks in 4 bits where vLLM's class can take that."""
    kind, config = ZOO[name]
    model = make_model(kind, directory / "model", **config)
    recipe = {
        "formats": {"w4": W4},
        "modules": [{"match": "blocks", "format": "w4"}],
        "on_unfit": "keep",
        "calibration": {"held_out": 0},
    }
    convert(model, recipe, directory / "packed", quiet=True)
    return directory / "packed"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_served_as_transformers_computes(engine: Engine, tmp_path: Path, name: str) -> None:
    packed = pack(name, tmp_path)
    assert difference(engine, packed) < WORST


def difference(engine: Engine, packed: Path) -> float:
    """The largest between log-probabilities of vLLM and of transformers."""
    expected, _ = reference(packed, prompts())
    env = {"VLLM_COMPRESS_KERNEL": "reference"}
    result = engine.run(packed, prompts(), dtype="float32", env=env)
    assert not result.error, result.error
    return max(
        abs(mine - theirs)
        for a, b in zip(result.logprobs, expected, strict=True)
        for mine, theirs in zip(a, b, strict=True)
    )


@pytest.mark.e2e
@pytest.mark.slow
def test_a_head_that_only_the_config_ties_is_served(engine: Engine, tmp_path: Path) -> None:
    kind, config = ZOO["llama-tied"]
    model = make_model(kind, tmp_path / "model", **config)
    tensors = read_tensors(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0) * 2
    write_tensors(model / "model.safetensors", tensors)
    packed = compress(model, tmp_path / "packed", {"w4": W4}, {"blocks": "w4", "embedding": "w4"})
    assert difference(engine, packed) < WORST


@pytest.mark.e2e
@pytest.mark.slow
def test_kinds_that_are_not_here_are_served_after_a_line(engine: Engine, tmp_path: Path) -> None:
    packed = pack("apertus", tmp_path)
    before = engine.log.count("serving of compressed apertus models is unproven")
    assert difference(engine, packed) < 2 * WORST
    assert engine.log.count("serving of compressed apertus models is unproven") == before + 1


def model_type(name: str) -> str:
    import transformers

    kind, _ = ZOO.get(name) or MIXTURES[name]
    found: str = getattr(transformers, f"{kind}Config").model_type
    return found


def encoder_type(name: str) -> str:
    import transformers

    found: str = getattr(transformers, ENCODERS[name][0]).config_class.model_type
    return found


def test_proven_kinds_are_those_compared_here() -> None:
    compared = {model_type(name) for name in [*SERVED, *SERVED_MIXTURES]}
    compared |= set(VISION)
    compared |= {encoder_type(name) for name in ENCODERS} - {"distilbert"}  # read as a BERT
    assert len(SERVED) >= 40
    assert proven_types() == compared
    for name in UNSERVED:
        assert not architecture_of({"model_type": model_type(name)}).proven

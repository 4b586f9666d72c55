"""Running models block by block: states, logits and errors are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.errors import CalibrationError
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.recorded import Call, require_same_calls
from compress_methods.model.skeleton import Skeleton, build_skeleton
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import ZOO

DEEP = ("falcon-new", "falcon-mha", "bloom", "mpt", "falcon_h1", "llama", "gpt2", "cohere")


def blockwise(directory: Path, tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """Logits by embedding, every block in turn, and what follows them."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    values = {name: p.detach() for name, p in whole.named_parameters(remove_duplicate=False)}
    values |= {name: b for name, b in whole.named_buffers() if name in whole.state_dict()}
    skeleton = build_skeleton(directory)
    runner = BlockRunner(skeleton, batch)
    outside = {n: v for n, v in values.items() if skeleton.block_of(n) is None}
    table = outside.pop(f"{skeleton.embedding}.weight")
    names = skeleton.parameter_names()
    runner.load({n: v for n, v in outside.items() if n in names})
    rows = tokens.unique()
    states = runner.embed(tokens, table[rows], rows)
    for index in range(len(skeleton.blocks)):
        prefix = f"{skeleton.blocks_name}.{index}."
        runner.load({n: v for n, v in values.items() if n.startswith(prefix) and n in names})
        runner.run(index, states)
    head = f"{skeleton.head}.weight"
    runner.load({head: values[head]})
    return torch.cat([runner.logits(piece) for piece in states.split(batch)])


@pytest.mark.parametrize("name", DEEP)
def test_blocks_one_by_one_are_the_model(tmp_path: Path, name: str) -> None:
    """Four blocks: a stub that answers a tensor where the model takes the first of a tuple loses
    an axis with each."""
    from transformers import AutoModelForCausalLM

    kind, config = ZOO[name]
    deeper = {key: 4 for key in ("num_hidden_layers", "n_layer", "n_layers") if key in config}
    directory = make_model(kind, tmp_path / "model", **{**config, **deeper})
    tokens = torch.randint(2, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
    assert torch.allclose(blockwise(directory, tokens, 2), expected, atol=1e-4)


def embedded(name: str, tmp_path: Path, sequences: int, batch: int) -> None:
    kind, config = ZOO[name]
    directory = make_model(kind, tmp_path / "model", **config)
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    skeleton: Skeleton = build_skeleton(directory)
    runner = BlockRunner(skeleton, batch)
    values: dict[str, Any] = dict(whole.named_parameters())
    names = skeleton.parameter_names()
    table = f"{skeleton.embedding}.weight"
    outside = {
        n: v.detach()
        for n, v in values.items()
        if skeleton.block_of(n) is None and n != table and n in names
    }
    runner.load(outside)
    tokens = torch.randint(2, 500, (sequences, 24), generator=torch.Generator().manual_seed(0))
    rows = tokens.unique()
    runner.embed(tokens, values[table].detach()[rows], rows)


@pytest.mark.parametrize("sequences", [2, 4])
def test_blocks_that_are_given_something_of_the_tokens_are_refused(
    tmp_path: Path, sequences: int
) -> None:
    with pytest.raises(CalibrationError, match=r"depends on the tokens") as caught:
        embedded("gemma3n", tmp_path, sequences, 2)
    assert "\n" not in str(caught.value)


def test_other_models_are_not(tmp_path: Path) -> None:
    embedded("llama", tmp_path, 5, 2)


def test_calls_are_compared_inside_what_holds_them() -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    require_same_calls([Call((a,), {"m": {"x": (a, b)}})], [Call((a,), {"m": {"x": (a, b)}})])
    require_same_calls([Call((a,), {})], [Call((a[:1],), {})])
    with pytest.raises(CalibrationError, match=r"'m\.x\[1\]'"):
        require_same_calls([Call((a,), {"m": {"x": (a, b)}})], [Call((a,), {"m": {"x": (a, a)}})])

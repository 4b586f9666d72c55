"""Methods that only another distribution knows (`tests/third_party`) are served: nothing but their
files and entry points is needed, in every process vLLM starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.support.encoders import BERT, save_with_biases
from tests.e2e.support.engine import REPOSITORY, Engine, Result
from tests.e2e.support.tiny import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ENTRIES = """
[vllm_compress.formats]
lookup2 = tests.third_party.lookup:Lookup2
low_rank = tests.third_party.low_rank:LowRank
two_tables = tests.third_party.two_tables:TwoTables
[vllm_compress.algorithms]
corrected_gptq = tests.third_party.low_rank:Corrected
[vllm_compress.transforms]
share = tests.third_party.sharing:Share
smooth = tests.third_party.smoothing:Smooth
[vllm_compress.architectures]
bert = tests.third_party.encoder:BERT
[vllm_compress.kernels]
low_rank = tests.third_party.low_rank:LowRankKernel
"""
OUTRANKS = """
[vllm_compress.kernels]
unpacked = tests.third_party.kernel:Unpacked
"""
CONVERT = """
import json, sys
from pathlib import Path
from compress_methods import convert, load_model
from tests.e2e.support.tiny import reference
place, recipes, prompts = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
for name, (model, recipe) in recipes.items():
    convert(place / model, recipe, place / name, quiet=True)
expected = {n: reference(place / n, prompts)[0] for n in recipes if n != "encoder"}
import torch
with torch.no_grad():
    expected["encoder"] = load_model(place / "encoder")(torch.tensor(prompts)).logits[0].tolist()
print(json.dumps(expected))
"""
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 410, 33, 34]]
INT4 = {"format": "integer", "bits": 4, "group_size": 32}
EXACT = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}


def distribution(site: Path, entries: str) -> dict[str, str]:
    """An environment in which a distribution with these entry points is installed."""
    metadata = site / "toys-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entries)
    inherited = os.environ.get("PYTHONPATH", "")
    paths = [str(site), str(REPOSITORY), *([inherited] if inherited else [])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def packing(algorithm: str = "rtn", **formats: Any) -> dict[str, Any]:
    """A recipe; `formats` by what their rule matches."""
    return {
        "formats": dict(formats),
        "modules": [{"match": n, "format": n, "algorithm": algorithm} for n in formats],
        "calibration": {"held_out": 0, "samples": 4, "length": 32},
    }


PLAIN = packing(blocks=INT4)
SHARED = {
    "stages": [
        {"transform": "share", "layer": 1, "owner": 0},
        {key: PLAIN[key] for key in ("formats", "modules")},
    ],
    "calibration": PLAIN["calibration"],
}
CORRECTED = packing("corrected_gptq", blocks={"format": "low_rank", "base": INT4, "rank": 8})
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lookup": ("model", packing(blocks={"format": "lookup2"})),
    "wrapper": ("model", CORRECTED),
    "tables": ("model", packing(embedding={"format": "two_tables"}, blocks=INT4)),
    "shared": ("model", SHARED),
    "plain": ("model", PLAIN),
    "encoder": ("bert", PLAIN),
}
"""Name of what comes out -> model and recipe."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return distribution(tmp_path_factory.mktemp("site"), ENTRIES)


@pytest.fixture(scope="module")
def toys(installed: dict[str, str]) -> Iterator[Engine]:
    with Engine(installed) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def expected(installed: dict[str, str], place: Path) -> dict[str, Any]:
    """Convert in a process where the toys are installed; what transformers computes with the stored
    values, by the name of the recipe."""
    from transformers import BertConfig, BertForMaskedLM

    model = make_model("Llama", place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = REPOSITORY / "tests" / "assets" / "novels-8m" / name
        (model / name).write_bytes(source.read_bytes())
    torch.manual_seed(0)
    save_with_biases(BertForMaskedLM(BertConfig(**BERT)), place / "bert")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(place), json.dumps(RECIPES), json.dumps(PROMPTS)],
        env={**os.environ, **installed},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def same(result: Result, expected: list[list[float]]) -> None:
    assert not result.error, result.error
    assert result.logprobs[0] == pytest.approx(expected[0], abs=2e-3)


def test_lookup_format(toys: Engine, place: Path, expected: dict[str, Any]) -> None:
    same(toys.run(place / "lookup", PROMPTS, dtype="float32"), expected["lookup"])
    assert "no fast kernel for lookup2 on cpu" in toys.log


def test_wrapper_format_whose_base_keeps_its_kernel(
    toys: Engine, place: Path, expected: dict[str, Any]
) -> None:
    before = len(toys.log)
    same(toys.run(place / "wrapper", PROMPTS, dtype="float32", env=EXACT), expected["wrapper"])
    assert "no fast kernel" not in toys.log[before:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_embedding_of_replicated_tensors(
    toys: Engine, place: Path, expected: dict[str, Any], ranks: int
) -> None:
    env = {"VLLM_COMPRESS_KERNEL": "reference"}
    options: dict[str, Any] = {"dtype": "float32", "env": env, "tensor_parallel_size": ranks}
    same(toys.run(place / "tables", PROMPTS, **options), expected["tables"])


def test_shared_layer(toys: Engine, place: Path, expected: dict[str, Any]) -> None:
    same(toys.run(place / "shared", PROMPTS, dtype="float32", env=EXACT), expected["shared"])


def test_encoder(toys: Engine, place: Path, expected: dict[str, Any]) -> None:
    """Its scores of every token are those of transformers with the stored values."""
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": False}
    result = toys.run(place / "encoder", PROMPTS, task="token_classify", env=EXACT, **options)
    assert not result.error, result.error
    assert torch.allclose(
        torch.tensor(result.pooled[0]), torch.tensor(expected["encoder"]), atol=2e-3
    )


def test_kernel_that_outranks_ours(place: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    with Engine(distribution(tmp_path / "site", OUTRANKS)) as engine:
        same(engine.run(place / "plain", PROMPTS, dtype="float32"), expected["plain"])
        # Of each layer q, k, v side by side, o, gate and up, down.
        assert engine.log.count("unpacked takes a matrix of") == 2 * 4

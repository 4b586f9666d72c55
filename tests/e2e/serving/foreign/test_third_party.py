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

from tests.e2e.support.engine import OFFLINE, REPOSITORY, Engine, Result
from tests.e2e.support.server import ENVIRONMENT
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
"""
KERNELS = """
[vllm_compress.kernels]
low_rank = tests.third_party.low_rank:LowRankKernel
"""
OUTRANKS = """
[vllm_compress.kernels]
unpacked = tests.third_party.kernel:Unpacked
"""
CONVERT = """
import sys, json
from pathlib import Path
from compress_methods import convert
from tests.e2e.support.tiny import reference
model, out, recipe, prompts = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
text = Path(model) / "text.txt"
convert(model, recipe, out, calibration=text if text.exists() else None, quiet=True)
print(json.dumps(reference(out, prompts)[0]))
"""
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 410, 33, 34]]
INT4 = {"format": "integer", "bits": 4, "group_size": 32}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def distribution(site: Path, entries: str) -> dict[str, str]:
    """An environment in which a distribution with these entry points is installed."""
    metadata = site / "toys-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entries)
    inherited = os.environ.get("PYTHONPATH", "")
    paths = [str(site), str(REPOSITORY), *([inherited] if inherited else [])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return distribution(tmp_path_factory.mktemp("site"), ENTRIES + KERNELS)


@pytest.fixture(scope="module")
def toys(installed: dict[str, str]) -> Iterator[Engine]:
    with Engine(installed) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("Llama", tmp_path_factory.mktemp("toys") / "model")


def converted(env: dict[str, str], model: Path, out: Path, recipe: dict[str, Any]) -> list[float]:
    """Convert in a process of its own; what transformers computes with the stored values."""
    arguments = [str(model), str(out), json.dumps(recipe), json.dumps(PROMPTS)]
    found: list[float] = printed(env, CONVERT, arguments)[0]
    return found


def printed(env: dict[str, str], code: str, arguments: list[str]) -> Any:
    """The JSON that a program prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **env},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def packing(**formats: Any) -> dict[str, Any]:
    """A recipe that rounds to nearest; `formats` by what their rule matches."""
    return {
        "formats": dict(formats),
        "modules": [{"match": name, "format": name, "algorithm": "rtn"} for name in formats],
        "calibration": {"held_out": 0},
    }


def same(result: Result, expected: list[float]) -> None:
    assert not result.error, result.error
    assert result.logprobs[0] == pytest.approx(expected, abs=2e-3)


def test_lookup_format(
    installed: dict[str, str], toys: Engine, model: Path, tmp_path: Path
) -> None:
    recipe = packing(blocks={"format": "lookup2"})
    expected = converted(installed, model, tmp_path / "out", recipe)
    same(toys.run(tmp_path / "out", PROMPTS, dtype="float32"), expected)
    assert "no fast kernel for lookup2 on cpu" in toys.log


def test_wrapper_format_whose_base_keeps_its_kernel(
    installed: dict[str, str], toys: Engine, model: Path, tmp_path: Path
) -> None:
    recipe = packing(blocks={"format": "low_rank", "base": INT4, "rank": 8})
    recipe["modules"][0]["algorithm"] = "corrected_gptq"
    recipe["calibration"] = {"samples": 4, "length": 32, "held_out": 0}
    (model / "text.txt").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = REPOSITORY / "tests" / "assets" / "novels-8m" / name
        (model / name).write_bytes(source.read_bytes())
    recipe = {**recipe, "modules": [{**recipe["modules"][0]}]}
    expected = converted(installed, model, tmp_path / "out", recipe)
    before = len(toys.log)
    env = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
    same(toys.run(tmp_path / "out", PROMPTS, dtype="float32", env=env), expected)
    assert "no fast kernel" not in toys.log[before:]


def test_embedding_of_replicated_tensors_on_two_ranks(
    installed: dict[str, str], model: Path, tmp_path: Path
) -> None:
    recipe = packing(embedding={"format": "two_tables"}, blocks=INT4)
    expected = converted(installed, model, tmp_path / "out", recipe)
    env = {"VLLM_COMPRESS_KERNEL": "reference"}
    with Engine({**installed, **TWO_RANKS}) as parallel:
        options: dict[str, Any] = {"dtype": "float32", "env": env}
        same(parallel.run(tmp_path / "out", PROMPTS, **options), expected)
        options["tensor_parallel_size"] = 2
        same(parallel.run(tmp_path / "out", PROMPTS, **options), expected)


def test_shared_layer(installed: dict[str, str], toys: Engine, model: Path, tmp_path: Path) -> None:
    recipe = packing(blocks=INT4)
    held = recipe.pop("calibration")
    recipe = {
        "stages": [{"transform": "share", "layer": 1, "owner": 0}, recipe],
        "calibration": held,
    }
    expected = converted(installed, model, tmp_path / "out", recipe)
    env = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
    same(toys.run(tmp_path / "out", PROMPTS, dtype="float32", env=env), expected)


ENCODE = """
import json, sys
from vllm import LLM
llm = LLM(sys.argv[1], runner="pooling", enforce_eager=True, dtype="float32", max_model_len=256,
          skip_tokenizer_init=True, num_gpu_blocks_override=16)
prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
found = llm.encode([prompt], pooling_task="token_classify", use_tqdm=False)[0].outputs.data
print(json.dumps(found.float().tolist()))
"""
LOGITS = """
import json, sys, torch
from compress_methods import convert, load_model
from transformers import AutoModelForMaskedLM, BertConfig
model, out, recipe, prompt = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
torch.manual_seed(0)
config = BertConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=256, max_position_embeddings=256, initializer_range=0.1)
AutoModelForMaskedLM.from_config(config).save_pretrained(model)
convert(model, recipe, out, quiet=True)
with torch.no_grad():
    print(json.dumps(load_model(out)(torch.tensor([prompt])).logits[0].softmax(-1).tolist()))
"""


def test_encoder(installed: dict[str, str], tmp_path: Path) -> None:
    """Its predictions of every token are those of transformers with the stored values."""
    paths = [str(tmp_path / "model"), str(tmp_path / "out")]
    arguments = [*paths, json.dumps(packing(blocks=INT4)), json.dumps(PROMPTS[0])]
    expected = printed(installed, LOGITS, arguments)
    env = {**ENVIRONMENT, **OFFLINE, **installed, "VLLM_COMPRESS_KERNEL": "cpu_exact"}
    found = printed(env, ENCODE, [paths[1], json.dumps(PROMPTS[0])])
    assert len(found) == len(PROMPTS[0])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-6)


def test_kernel_that_outranks_ours(model: Path, tmp_path: Path) -> None:
    env = distribution(tmp_path / "site", OUTRANKS)
    expected = converted(env, model, tmp_path / "out", packing(blocks=INT4))
    with Engine(env) as engine:
        same(engine.run(tmp_path / "out", PROMPTS, dtype="float32"), expected)
        # Of each layer q, k, v side by side, o, gate and up, down.
        assert engine.log.count("unpacked takes a matrix of") == 2 * 4

"""Low-rank matrices are served as transformers computes with the values that they stand for, over
one rank and over two, and as a base with a LoRA adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert, split_adapter
from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import OFFLINE, REPOSITORY, Engine, Result
from tests.e2e.support.server import ENVIRONMENT
from tests.e2e.support.tiny import reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORST = 0.02
INT8: dict[str, Any] = {"format": "integer", "bits": 8, "group_size": -1}
INT4: dict[str, Any] = {"format": "integer", "bits": 4, "group_size": 64}
INT2: dict[str, Any] = {"format": "integer", "bits": 2, "group_size": 128, "levels": "mid"}
TURNED = {"format": "rotated", "base": INT4, "block": 64}
FORMATS: dict[str, Any] = {
    "few": {"format": "lowrank", "rank": 8, "base": INT4},
    "integers": {"format": "lowrank", "rank": 32, "base": INT2, "factors": INT8},
    "turned": {"format": "lowrank", "rank": 16, "base": TURNED},
    "alone": {"format": "lowrank", "rank": 96, "factors": INT8},
    "dense": {"format": "lowrank", "rank": 192},
}
SVD = {"algorithm": "svd", "base": {"algorithm": "gptq", "clip": True}, "rounds": 2}
EXACT = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}


@pytest.fixture(scope="module")
def mixed(novels_8m: Path, validation_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block in each kind of format, chosen on text, the vocabulary in two of them."""
    out = tmp_path_factory.mktemp("lowrank") / "out"
    match = {
        r"re:model\.layers\.0\..*": "few",
        r"re:model\.layers\.1\..*": "integers",
        r"re:model\.layers\.2\..*": "turned",
        r"re:model\.layers\.3\..*mlp.*": "alone",
        r"re:model\.layers\.4\..*mlp.*": "dense",
    }
    rules = [{"match": name, "format": fmt, "algorithm": SVD} for name, fmt in match.items()]
    rules += [{"match": "lm_head", "format": "few"}, {"match": "embedding", "format": "integers"}]
    calibration = {"samples": 16, "length": 128, "held_out": 0}
    recipe = {"formats": FORMATS, "modules": rules, "calibration": calibration}
    convert(novels_8m, recipe, out, calibration=validation_text, quiet=True)
    return out


def worst(result: Result, logprobs: list[list[float]]) -> float:
    assert not result.error, result.error
    pairs = zip(chain(*result.logprobs), chain(*logprobs), strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_served_as_transformers_computes(
    engine: Engine, mixed: Path, novel_tokens: list[list[int]]
) -> None:
    logprobs, top = reference(mixed, novel_tokens[:4])
    for kernel in ("cpu_exact", "reference"):
        env = {"VLLM_COMPRESS_KERNEL": kernel}
        result = engine.run(mixed, novel_tokens[:4], dtype="float32", env=env)
        difference, agreement = compare(result, logprobs, top)
        print(f"{kernel}: {difference:.6f} nats, at worst {worst(result, logprobs):.6f}")
        assert worst(result, logprobs) < WORST
        assert agreement > 0.95


def test_two_ranks_share_the_factors(
    engine: Engine, mixed: Path, novel_tokens: list[list[int]]
) -> None:
    logprobs, _ = reference(mixed, novel_tokens[:4])
    result = engine.run(mixed, novel_tokens[:4], dtype="float32", env=EXACT, tensor_parallel_size=2)
    print(f"two ranks: at worst {worst(result, logprobs):.6f} nats")
    assert worst(result, logprobs) < WORST


ADAPTED = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(base, enable_lora=True, max_lora_rank=8, max_loras=1, enforce_eager=True, dtype="float32",
          max_model_len=512, num_gpu_blocks_override=64, enable_prefix_caching=False,
          skip_tokenizer_init=True)
settings = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True,
                          detokenize=False)
found = []
for request in (LoRARequest("whole", 1, adapter), None):
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False,
                           lora_request=request)
    answers = [output.outputs[0] for output in outputs]
    found.append([[list(a.token_ids), [e[t].logprob for t, e in zip(a.token_ids, a.logprobs)]]
                  for a in answers])
print(json.dumps(found))
"""


def test_a_base_with_its_adapter_is_the_whole(
    novels_8m: Path, novel_tokens: list[list[int]], tmp_path: Path
) -> None:
    """vLLM's own LoRA adds the factors; without them the base is served. Of tokens it writes: it
    cannot give log-probabilities of prompts where an adapter may change the head."""
    recipe = {
        "formats": {"w": {"format": "lowrank", "rank": 8, "base": INT2}},
        "modules": [{"match": "blocks", "format": "w"}],
        "calibration": {"held_out": 0},
    }
    convert(novels_8m, recipe, tmp_path / "whole", quiet=True)
    split_adapter(tmp_path / "whole", tmp_path / "apart")
    prompts = [tokens[:64] for tokens in novel_tokens[:2]]
    arguments = [str(tmp_path / "apart" / part) for part in ("base", "adapter")]
    done = subprocess.run(
        [sys.executable, "-c", ADAPTED, *arguments, json.dumps(prompts)],
        env={**os.environ, **ENVIRONMENT, **OFFLINE, **EXACT},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, base = json.loads(done.stdout.splitlines()[-1])
    for found, directory in ((whole, tmp_path / "whole"), (base, tmp_path / "apart" / "base")):
        rows = [p + written for p, (written, _) in zip(prompts, found, strict=True)]
        expected = [row[-8:] for row in reference(directory, rows)[0]]
        pairs = zip(chain(*(values for _, values in found)), chain(*expected), strict=True)
        differences = [abs(a - b) for a, b in pairs]
        print(f"{directory.name}: at worst {max(differences):.6f} nats")
        assert max(differences) < WORST

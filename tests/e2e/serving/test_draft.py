"""A compressed version of a model writes ahead of it: no token changes, and metrics count them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from compress_methods import convert
from compress_methods.checkpoint.loading.model import load_model
from tests.e2e.support.server import VllmServer
from vllm_compress.operations.kv_cache import GIB, kept_by

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PROMPTS = [[5, 60, 700, 81, 9, 300, 20, 410], [1, 511, 255]]
TOKENS = 40


def test_a_draft_changes_no_token(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    recipe = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
        "calibration": {"held_out": 4, "length": 64},
    }
    draft = tmp_path / "draft"
    convert(novels_8m, recipe, draft, calibration=some_text, device="cpu", quiet=True)
    alone = load_model(novels_8m)
    alone.generation_config.eos_token_id = None
    server = VllmServer(novels_8m)
    start = server.command.index("--port")
    ours = [sys.executable, "-m", "vllm_compress.cli", "serve", str(novels_8m)]
    server.command = [*ours, "--draft", str(draft), "--dtype", "float32", *server.command[start:]]
    with server:
        assert "% accepted" in server.log
        # vLLM finds room for as many tokens as `serve` counts of both models.
        room = re.search(r"KV cache size: ([\d,]+) tokens", server.log)
        kept = kept_by([str(novels_8m), str(draft)], 1, 4, None)
        assert room is not None
        assert kept is not None
        assert int(room[1].replace(",", "")) == kept.tokens(GIB)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            expected = alone.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, len(prompt) :]
            answer = client.completions.create(
                model=str(novels_8m),
                prompt=prompt,
                max_tokens=TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            assert answer.choices[0].token_ids == expected.tolist()  # type: ignore[attr-defined]
        counted = {
            sample.name.removeprefix("vllm_compress_"): sample.value
            for family in text_string_to_metric_families(server.get("/metrics"))
            for sample in family.samples
        }
    accepted = counted["draft_tokens_accepted_total"]
    assert 0.5 < accepted / counted["draft_tokens_total"] < 1
    assert accepted < counted["generation_tokens_total"] == TOKENS * len(PROMPTS)

"""Two processes over gloo train what one would, and refuse what they cannot share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, recover
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.errors import RecipeError
from compress_methods.recipe.training import Training

SIZE: dict[str, Any] = {"steps": 4, "batch": 4, "sequences": 16, "held_out": 4, "length": 32}


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "vllm_compress.cli", *arguments]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **alone}
    )


@pytest.mark.slow
def test_two_processes_train_what_one_would(
    pruned: Path, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    settings = Training("distill", data=str(some_text), top_k=16, **SIZE)
    alone = recover(pruned, novels_8m, tmp_path / "one", settings, device="cpu", quiet=True)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SIZE.items()]
    options += ["--train=distill", "--top-k=16", "--data", str(some_text), "--device=cpu"]
    out = tmp_path / "two"
    command = ["recover", str(pruned), "--teacher", str(novels_8m), "-o", str(out), *options]
    run = launched(*command)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("serve it:") == 1
    together = json.loads((out / "report.json").read_text(encoding="utf-8"))
    facts = [report["training"][0] for report in (alone, together)]
    mine, theirs = (torch.tensor(one["held_out_curve"]) for one in facts)
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
    assert facts[1]["held_out"]["kl"] < 0.95 * facts[1]["before"]["kl"]
    first, second = (read_entries(tmp_path / name) for name in ("one", "two"))
    name = "model.layers.1.mlp.up_proj.weight"
    start = read_entries(pruned)[name].read().float()
    moved = [entries[name].read().float() - start for entries in (first, second)]
    assert torch.cosine_similarity(*(one.flatten() for one in moved), dim=0) > 0.9
    assert not (out / ".work").exists()


def test_a_batch_that_cannot_be_shared_is_refused(
    pruned: Path, novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="batch is 4, expected a multiple of 3 processes"):
        recover(pruned, novels_8m, tmp_path / "out", Training("distill", **SIZE), quiet=True)
    recipe = {"stages": [{"transform": "depth", "keep": [0]}, {"train": "distill", **SIZE}]}
    with pytest.raises(
        RecipeError, match="train is carried out by one process, and 3 were started"
    ):
        convert(novels_8m, recipe, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()

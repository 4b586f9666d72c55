"""A broken installation of ours leaves other models as they were, at the price of one warning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.support.engine import REPOSITORY, Engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BROKEN = '''
import sys


class Broken:
    """Makes two modules of ours fail to import, as a botched upgrade would."""

    def find_spec(self, name, path=None, target=None):
        if name in ("vllm_compress.config", "compress_methods.formats"):
            raise ImportError(f"{name} is broken")


sys.meta_path.insert(0, Broken())
'''


def test_a_plain_model_is_served_beside_a_broken_installation(
    engine: Engine, novels_8m: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    prompts = [[5, 6, 7, 8, 9, 10]]
    healthy = engine.run(novels_8m, prompts, tokens=4)
    with Engine({"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}) as broken:
        result = broken.run(novels_8m, prompts, tokens=4)
        log = broken.log
    assert not result.error, result.error
    assert result == healthy
    assert log.count("vllm-compress is not available") == 1
    assert "vllm_compress.config is broken" in log

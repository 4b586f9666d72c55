"""Code that comes with a model is never run, and nobody is asked whether to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.errors import CheckpointError
from compress_methods.model.skeleton import build_skeleton


@pytest.fixture
def foreign(novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose config, model and tokenizer are Python files that leave a trace when run;
    whoever is asked says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "model"
    shutil.copytree(novels_8m, out)
    trace = tmp_path / "ran"
    (out / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((out / "config.json").read_text())
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    config |= {"model_type": "own", "architectures": ["M"], "auto_map": classes}
    (out / "config.json").write_text(json.dumps(config))
    settings = out / "tokenizer_config.json"
    block = json.loads(settings.read_text()) if settings.exists() else {}
    block |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}}
    settings.write_text(json.dumps(block))
    return out


@pytest.mark.parametrize("load", [build_skeleton, load_tokenizer])
def test_code_of_a_model_is_refused_without_a_question(
    foreign: Path, load: Callable[[Path], object]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(foreign)
    assert not (foreign.parent / "ran").exists()
    assert "Python code of its own, which is never run" in str(caught.value)
    assert "\n" not in str(caught.value)

"""transformers loads a compressed directory once `compress_methods` is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from compress_methods import convert, load_model
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import ZOO

INT8 = {"format": "integer", "bits": 8, "group_size": -1}
IDS = torch.arange(2, 34)[None]
CASES = {
    "llama": (["blocks", "lm_head", "embedding"], {}),
    "llama-tied": (["blocks", "embedding"], {}),
    "gpt2": (["blocks", "embedding"], {}),
    "falcon-new": (["blocks"], {}),
    "qwen2": (["blocks"], {"activations": "int8"}),
}


def pack(name: str, directory: Path) -> Path:
    kind, config = ZOO[name]
    match, more = CASES[name]
    recipe = {
        "formats": {"w8": {**INT8, **more}},
        "modules": [{"match": match, "format": "w8"}],
        "calibration": {"held_out": 0},
    }
    convert(make_model(kind, directory / "m", **config), recipe, directory / "o", quiet=True)
    return directory / "o"


def written(model: Any) -> list[int]:
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    found: list[int] = out[0].tolist()
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_logits_and_generation_are_those_of_load_model(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = pack(name, tmp_path)
    expected = load_model(out)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(found(IDS).logits, expected(IDS).logits, atol=1e-5)
    expected.config.use_cache = True
    assert written(found) == written(expected)


def test_the_base_alone_and_saving_what_was_unpacked(tmp_path: Path) -> None:
    out = pack("llama", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModel.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], whole.model(IDS)[0])
    whole.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, whole(IDS).logits)
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("first", ["compress_methods", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    code = (
        f"import {first}, compress_methods, transformers.quantizers.auto as auto; "
        "print('vllm_compress' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_importing_the_methods_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, compress_methods; "
        "print({m for m in ('torch', 'transformers') if m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_card_says_first_what_happens_without_the_import(tmp_path: Path) -> None:
    card = (pack("llama", tmp_path) / "README.md").read_text(encoding="utf-8")
    body = card.split("---\n")[-1].strip().splitlines()
    assert body[0].startswith("# ")
    assert "`import compress_methods` before `from_pretrained`" in body[2]
    assert "random weights" in body[2]

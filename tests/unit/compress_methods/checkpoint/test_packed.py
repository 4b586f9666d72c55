"""Layers that stay packed compute what unpacked ones do, generate, and take adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, load_model
from compress_methods.checkpoint.loading.packed import PackedLinear
from compress_methods.errors import CheckpointError
from tests.e2e.support.tiny import make_model

IDS = torch.arange(2, 34)[None]
INT4 = {"format": "integer", "bits": 4, "group_size": 32}
INT8 = {"format": "integer", "bits": 8, "group_size": -1}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    recipe = {
        "formats": {"w4": INT4, "w8": INT8},
        "modules": [
            {"match": "blocks", "format": "w4"},
            {"match": ["embedding", "lm_head"], "format": "w8"},
        ],
        "calibration": {"held_out": 0},
    }
    convert(make_model("Llama", folder / "m"), recipe, folder / "o", quiet=True)
    return folder / "o"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding of inputs, which the default kernel of 4 bits has."""
    from compress_methods.checkpoint.loading import packed as module
    from compress_methods.kernels import Want, prepare

    monkeypatch.setattr(module, "prepare", lambda stored: prepare(stored, Want(kernel="cpu_exact")))


def test_logits_and_generation_are_those_of_the_unpacked_model(packed: Path) -> None:
    plain, model = load_model(packed), load_model(packed, packed=True)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 15
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-3)
    with torch.enable_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-3)
    settings: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), plain.generate(IDS, **settings))
    assert sum(p.numel() for p in model.parameters()) < 0.3 * sum(
        p.numel() for p in plain.parameters()
    )


def test_gradients_of_inputs_are_the_unpacked_layer_s(packed: Path) -> None:
    plain, model = load_model(packed), load_model(packed, packed=True)
    name = "model.layers.0.mlp.up_proj"
    x = torch.randn(5, 128, requires_grad=True)
    gradients = []
    for each in (plain, model):
        (found,) = torch.autograd.grad(each.get_submodule(name)(x).square().sum(), x)
        gradients.append(found)
    assert torch.allclose(*gradients, atol=1e-3, rtol=1e-4)


def test_an_adapter_is_trained_on_the_packed_base(packed: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(packed, packed=True)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    stored = model.model.layers[0].mlp.down_proj.base_layer.weight_packed.clone()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    assert torch.equal(model.model.layers[0].mlp.down_proj.base_layer.weight_packed, stored)
    with pytest.raises(RuntimeError):
        adapted.merge_adapter()
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(packed, packed=True), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, wanted, atol=1e-4)
    plain = peft.PeftModel.from_pretrained(load_model(packed), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, wanted, atol=1e-2)


def test_saving_it_and_packing_what_is_plain_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is saved already"):
        load_model(packed, packed=True).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot stay packed"):
        load_model(make_model("Llama", tmp_path / "m"), packed=True)

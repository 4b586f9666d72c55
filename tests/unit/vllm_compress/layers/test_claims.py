"""Compressed matrices that no layer of vLLM asks for are named before anything is served."""

from __future__ import annotations

import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from compress_methods.errors import CheckpointError
from compress_methods.formats.integer import Integer

pytest.importorskip("vllm")

from vllm_compress import model_classes
from vllm_compress.config import CompressConfig
from vllm_compress.layers.claims import Claims
from vllm_compress.targets import Target

FORMAT = Integer(bits=4, group_size=32)


def target(module: str) -> Target:
    return Target(module, (64, 64), FORMAT)


def test_an_unclaimed_matrix_is_named_once() -> None:
    claims = Claims()
    claims.expect([target("model.layers.0.q_a_proj"), target("model.layers.0.o_proj")])
    claims.add([target("model.layers.0.o_proj")])
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.q_a_proj: compressed, but"):
        pickle.loads(pickle.dumps(claims)).check()


def test_all_claimed_is_well_and_other_ranks_blocks_are_not_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claims = Claims()
    claims.expect([target("model.layers.0.o_proj"), target("model.layers.1.o_proj")])
    claims.add([target("model.layers.1.o_proj")])
    monkeypatch.setattr("vllm_compress.layers.claims._pipeline_ranks", lambda: 2)
    claims.check()
    claims.checked = False
    monkeypatch.setattr("vllm_compress.layers.claims._pipeline_ranks", lambda: 1)
    with pytest.raises(CheckpointError, match=r"layers\.0\.o_proj"):
        claims.check()


def test_the_loader_of_vllm_asks_before_the_first_tensor() -> None:
    block: dict[str, Any] = {
        "quant_method": "vllm_compress",
        "version": 1,
        "formats": {"w4": FORMAT.to_dict()},
        "modules": [{"match": "re:.*", "format": "w4", "shape": [64, 64]}],
    }
    config = CompressConfig.from_config(block)
    config.claims.expect([target("a.0.q_a_proj")])
    with pytest.raises(CheckpointError, match="q_a_proj"):
        config.get_cache_scale_mapper()


def test_fused_layers_of_classes_that_do_not_say_what_is_in_them() -> None:
    """vLLM's GPT-J has no packed_modules_mapping."""
    config = CompressConfig.from_config(
        {
            "quant_method": "vllm_compress",
            "version": 1,
            "formats": {"w4": FORMAT.to_dict()},
            "modules": [{"match": "re:.*", "format": "w4", "shape": [64, 64]}],
        }
    )
    config.targets = {f"h.0.attn.{leaf}": target(leaf) for leaf in ("q_proj", "k_proj", "v_proj")}
    found = config.fused("h.0.attn.qkv_proj")
    assert [t.module for t in found] == ["q_proj", "k_proj", "v_proj"]


def settings(model_type: str) -> Any:
    config = SimpleNamespace(model_type=model_type)
    config.get_text_config = lambda: config
    return config


def test_unproven_models_are_served_after_one_line(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.vllm_compress"):
        model_classes.warn_unproven(settings("llama"))
        assert not caplog.records
        model_classes.warn_unproven(settings("something_new"))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "serving of compressed something_new models is unproven"
    ]


def test_a_matrix_that_vllm_builds_without_a_name_is_refused() -> None:
    targets = {"model.layers.0.self_attn.q_a_proj": target("model.layers.0.self_attn.q_a_proj")}
    with pytest.raises(CheckpointError, match="minicpm3 cannot take it so"):
        model_classes.check_rows(targets, settings("minicpm3"))

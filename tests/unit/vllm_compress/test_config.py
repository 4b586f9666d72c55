"""CompressConfig: which layer method a module gets, and what is refused before anything starts."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from compress_methods.errors import CheckpointError

pytest.importorskip("vllm")

from vllm_compress import register
from vllm_compress.config import CompressConfig
from vllm_compress.model_classes import (
    OURS,
    WITH_RELU,
    check_vocabulary,
    choose_classes,
    takes_quant_config,
)
from vllm_compress.targets import Target

W4 = {"format": "integer", "bits": 4, "group_size": 32}
W8 = {"format": "integer", "bits": 8, "group_size": -1}
BLOCK: dict[str, Any] = {
    "quant_method": "vllm_compress",
    "version": 1,
    "formats": {"w4": W4, "w8": W8},
    "modules": [{"match": r"re:.*_proj", "format": "w4", "shape": [64, 64]}],
    "embedding": "model.embed_tokens",
    "tied": {"lm_head": "model.embed_tokens"},
}
ATTENTION = "model.layers.0.self_attn"


def config(modules: dict[str, str]) -> CompressConfig:
    out = CompressConfig.from_config(BLOCK)
    for module, fmt in modules.items():
        out.targets[module] = Target(module, (64, 64), out.spec.formats[fmt])
    out.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return out


def test_importing_the_plugin_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_compress; "
        "print({m for m in ('torch', 'vllm', 'compress_methods') if m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_register_can_be_repeated() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    register()
    register()
    assert QUANTIZATION_METHODS.count("vllm_compress") == 1
    assert get_quantization_config("vllm_compress") is CompressConfig


def test_a_class_of_ours_is_for_compressed_checkpoints_alone() -> None:
    from vllm.model_executor.models import ModelRegistry

    register()
    relu = SimpleNamespace(pooler_activation="relu")
    pairs = [(pair, SimpleNamespace()) for pair in OURS.items()]
    pairs += [(pair, relu) for pair in WITH_RELU.items()]
    for (theirs, mine), hf_config in pairs:
        hf_config.architectures = [theirs]
        choose_classes(hf_config)
        assert hf_config.architectures == [mine]
        assert ModelRegistry.models[mine].load_model_cls().__name__ == mine
        assert "vllm_compress" not in ModelRegistry.models[theirs].module_name
    for name in ("BertModel", "BertForSequenceClassification"):
        other = SimpleNamespace(architectures=[name])
        choose_classes(other)
        assert other.architectures == [name]


def test_fused_layers_are_found_by_their_parts() -> None:
    made = config({f"{ATTENTION}.{n}_proj": "w4" for n in "qkvo"})
    found = made.fused(f"{ATTENTION}.qkv_proj")
    assert [t.module for t in found] == [f"{ATTENTION}.{n}_proj" for n in "qkv"]
    assert [t.module for t in made.fused(f"{ATTENTION}.o_proj")] == [f"{ATTENTION}.o_proj"]
    assert made.fused("model.layers.0.mlp.gate") == []


def test_a_layer_stored_fused_is_found_whole() -> None:
    made = config({f"{ATTENTION}.qkv_proj": "w4"})
    made.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    assert len(made.fused(f"{ATTENTION}.qkv_proj")) == 1


@pytest.mark.parametrize("third", ["w8", None])
def test_parts_of_a_fused_layer_must_share_a_format(third: str | None) -> None:
    parts = {f"{ATTENTION}.q_proj": "w4", f"{ATTENTION}.k_proj": "w4"}
    made = config(parts | ({f"{ATTENTION}.v_proj": third} if third else {}))
    with pytest.raises(CheckpointError, match="must share a format; q_proj is int4 g32") as error:
        made.fused(f"{ATTENTION}.qkv_proj")
    assert ("v_proj is int8 row" if third else "v_proj is kept as it is") in str(error.value)


def test_an_embedding_without_a_name_is_found() -> None:
    made = config({"model.embed_tokens": "w8"})
    assert made.embedding("", is_head=False) == made.targets["model.embed_tokens"]
    assert made.embedding("lm_head", is_head=True) is None
    assert config({f"{ATTENTION}.q_proj": "w4"}).embedding("", is_head=False) is None


def test_names_follow_the_models_mapper() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    made = config({"model.language_model.layers.0.mlp.down_proj": "w4"})
    made.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    )
    (target,) = made.fused("language_model.model.layers.0.mlp.down_proj")
    assert target.module == "model.language_model.layers.0.mlp.down_proj"


def test_a_checkpoint_of_the_base_model_lacks_a_prefix() -> None:
    made = config({"h.0.attn.c_attn": "w4"})
    assert made.find("transformer.h.0.attn.c_attn") is not None
    assert made.find("transformer.h.1.attn.c_attn") is None


def test_vllm_can_send_it_to_workers() -> None:
    made = config({f"{ATTENTION}.o_proj": "w4"})
    assert pickle.loads(pickle.dumps(made)).targets == made.targets


def test_which_models_take_a_compressed_embedding() -> None:
    models = "vllm.model_executor.models"
    for module, cls, expected in (
        ("llama", "LlamaForCausalLM", True),
        ("phi3", "Phi3ForCausalLM", True),
        ("qwen3", "Qwen3ForCausalLM", True),
        ("opt", "OPTForCausalLM", False),
    ):
        assert takes_quant_config(f"{models}.{module}", cls, "VocabParallelEmbedding") is expected


def test_a_tied_head_that_the_model_cannot_take_is_refused() -> None:
    made = config({"model.embed_tokens": "w8", "lm_head": "w8"})
    check_vocabulary(["LlamaForCausalLM"], made)
    check_vocabulary(["ModelOfTheFuture"], made)
    with pytest.raises(CheckpointError, match="OPTForCausalLM cannot take it so"):
        check_vocabulary(["OPTForCausalLM"], made)

"""Classes of vLLM that take no compressed embedding or output head.

They build it without a `quant_config`, so compressed tensors would meet no parameter. Listed here
so that conversions, which know no vLLM, can say it before any work; a test compares the lists with
the source of the vLLM that is installed. The server asks that source itself.
"""

from __future__ import annotations

from typing import Any

NO_HEAD = frozenset(
    [
        "BloomForCausalLM",
        "FalconMambaForCausalLM",
        "FalconH1ForCausalLM",
        "Qwen3NextForCausalLM",
        "GptOssForCausalLM",
        "JambaForCausalLM",
        "MambaForCausalLM",
        "Mamba2ForCausalLM",
        "OPTForCausalLM",
        "Plamo3ForCausalLM",
        "Step3TextForCausalLM",
        "Zamba2ForCausalLM",
    ]
)
NO_EMBEDDING = NO_HEAD | frozenset(
    [
        "AfmoeForCausalLM",
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Glm4MoeForCausalLM",
        "GPTJForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "HYV3ForCausalLM",
        "InternLM2ForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "LongcatFlashForCausalLM",
        "LongcatFlashNgramForCausalLM",
        "MiniCPMForCausalLM",
        "MiniCPM3ForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "MuseGlimmerForCausalLM",
        "OlmoHybridForCausalLM",
        "OrionForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Step3p5ForCausalLM",
        "SolarForCausalLM",
        "BailingMoeV3VLForConditionalGeneration",
        "CohereCompassForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "Moondream3ForCausalLM",
        "HfMoondream",
        "MuseGlimmerForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    ]
)


def why_not_served(kind: str, model: Any, tied: bool) -> str | None:
    """Why vLLM could not serve a compressed `embedding` or `lm_head` of a transformers model.

    A tied head is the embedding.
    """
    names = getattr(model.config, "architectures", None) or [type(model).__name__]
    refused = NO_HEAD if kind == "lm_head" else NO_EMBEDDING
    if kind == "embedding" and tied:
        refused = NO_EMBEDDING | NO_HEAD
    if kind not in ("embedding", "lm_head") or names[0] not in refused:
        return None
    what = "output head" if kind == "lm_head" else "embedding"
    return f"vLLM's {names[0]} takes no compressed {what}"

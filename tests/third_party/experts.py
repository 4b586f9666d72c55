"""A row for a mixture of experts: what the matrices in its fused expert tensors are called."""

from compress_methods.model.architecture import Architecture, register_architecture

MIXTURE = register_architecture(
    Architecture(
        "Qwen3 mixture",
        ("qwen3_moe",),
        experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    )
)

"""A row for BERT: an encoder, judged by the tokens that stand where it looks."""

from compress_methods.model.architecture import Architecture, register_architecture
from compress_methods.model.task import SAME_TOKEN

BERT = register_architecture(
    Architecture(
        "BERT",
        ("bert",),
        auto_class="AutoModelForMaskedLM",
        blocks="bert.encoder.layer",
        fused=(("query", "key", "value"),),
        row_parallel=frozenset(("dense",)),
        routers=(),
        vllm_names={"attention.output.qkv_proj": "attention.self.qkv_proj"},
        loss=SAME_TOKEN,
    )
)

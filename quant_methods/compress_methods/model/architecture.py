"""What kinds of model there are: one table of plain data.

Everything is found by structure where that is possible; a row says what structure cannot: which
class of transformers builds the model, which matrices vLLM runs as one, what its head is judged by.
The first row answers for every model that no other names. A new architecture is one more row:
`register_architecture`, or an entry point in the group `vllm_compress.architectures` that does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

from compress_methods.model.task import NEXT_TOKEN, SAME_TOKEN, task_of

GROUP = "vllm_compress.architectures"
WHOLE_HEADS, ROTARY_HALVES = "whole_heads", "rotary_halves"
"""How vLLM's class moves rows while it loads: heads as they are (the fused query-key-value of BLOOM
and Falcon), or the even and odd rows of every head into its two halves (Llama-4)."""


@dataclass(frozen=True)
class Architecture:
    """`model_types`: what config.json calls it; none in the generic row.

    `auto_class`: of transformers. `blocks`: dotted name of the list of blocks, the largest
    `ModuleList` where not said. `head`: dotted name of the output head, transformers' own answer
    where not said. `fused`: leaves that vLLM runs as one matrix. `row_parallel`: leaves, with
    their parents where leaves do not tell, that tensor parallelism cuts by columns.
    `routers`: leaves that choose experts, never compressed unnamed.
    `experts`: parameter of all experts -> the matrices in it. `experts_transposed`: whether they
    lie [inputs, outputs], where transformers' class does not say.
    `vllm_names`: parts of module names that vLLM's class spells in another way -> as here; behind
    a `^` how they begin.
    `loss`: what outputs are judged by, as `task.py` says; both it and `auto_class` give way to
    what the architecture's name in config.json tells.
    `prunable`: whether a narrower or shallower one is known to load in vLLM.
    `moved_rows`: leaves whose rows vLLM's class moves while it loads, and how.
    `unquantized`: leaves that vLLM's class builds without a quantization method or a true name;
    `only_blocks`: all outside the blocks are.
    `added_config`: keys that vLLM's class reads and transformers no longer writes, with the values
    that transformers' class has built in.
    `proven`: whether served log-probabilities were compared with transformers' (a test does it).
    """

    name: str
    model_types: tuple[str, ...] = ()
    auto_class: str = "AutoModelForCausalLM"
    blocks: str | None = None
    head: str | None = None
    fused: tuple[tuple[str, ...], ...] = (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )
    row_parallel: frozenset[str] = frozenset(
        ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "w2", "wo", "dense", "dense_4h_to_h")
    )
    routers: tuple[str, ...] = ("gate", "router", "wg", "shared_expert_gate")
    experts: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "gate_up_proj": ("gate_proj", "up_proj"),
            "up_proj": ("up_proj",),
            "down_proj": ("down_proj",),
        }
    )
    experts_transposed: bool = False
    vllm_names: Mapping[str, str] = field(default_factory=dict)
    loss: str = NEXT_TOKEN
    prunable: bool = False
    moved_rows: Mapping[str, str] = field(default_factory=dict)
    unquantized: frozenset[str] = frozenset()
    only_blocks: bool = False
    added_config: Mapping[str, Any] = field(default_factory=dict)
    proven: bool = False

    def transposes(self, experts: Any) -> bool:
        """Whether the matrices of a module of experts lie [inputs, outputs]."""
        return bool(getattr(experts, "is_transposed", self.experts_transposed))

    def cuts_columns(self, module: str) -> bool:
        """Whether tensor parallelism cuts a module's columns, not its rows."""
        return any(f".{module}".endswith(f".{leaf}") for leaf in self.row_parallel)

    def group(self, leaf: str) -> tuple[str, ...]:
        """The leaves that vLLM runs as one matrix with this one, itself among them."""
        return next((leaves for leaves in self.fused if leaf in leaves), (leaf,))

    def group_name(self, module: str) -> str:
        """The same name for modules that vLLM runs as one matrix."""
        parent, _, leaf = module.rpartition(".")
        leaves = self.group(leaf)
        return module if len(leaves) == 1 else f"{parent}.{'+'.join(leaves)}"


GENERIC = Architecture("causal LM")
_ROWS: dict[str, Architecture] = {}
_loaded: list[bool] = []


def register_architecture(row: Architecture) -> Architecture:
    """Enter a row, in place of one that names the same model types."""
    _ROWS.update(dict.fromkeys(row.model_types, row))
    return row


def architecture_of(config: Any) -> Architecture:
    """The row of a model: `config` is transformers' or the mapping in config.json."""
    if not _loaded:
        _loaded.append(True)
        for entry in entry_points(group=GROUP):
            entry.load()
    found = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    row, task = _ROWS.get(str(found), GENERIC), task_of(config)
    return row if task is None else replace(row, auto_class=task.auto_class, loss=task.loss)


COMPARED = """arcee cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe
gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe helium hunyuan_v1_dense hunyuan_v1_moe
mamba2 ministral ministral3 mixtral nemotron olmo olmo2 olmo3 olmoe opt phi phi3 qwen2_moe
qwen3_moe seed_oss smollm3 stablelm starcoder2"""
"""Model types with nothing of their own to say, whose serving a test compares with transformers."""
register_architecture(Architecture("compared causal LM", tuple(COMPARED.split()), proven=True))
register_architecture(
    Architecture("Llama-like", ("llama", "mistral", "qwen2", "qwen3"), prunable=True, proven=True)
)
register_architecture(
    Architecture(
        "heads fused by group",
        ("bloom", "falcon"),
        moved_rows={"query_key_value": WHOLE_HEADS},
        proven=True,
    )
)
register_architecture(
    Architecture(
        "Llama-4",
        ("llama4", "llama4_text"),
        experts_transposed=True,
        moved_rows={"q_proj": ROTARY_HALVES, "k_proj": ROTARY_HALVES},
        proven=True,
    )
)
register_architecture(
    Architecture("MiniCPM3", ("minicpm3",), unquantized=frozenset(("q_a_proj",)), proven=True)
)


MAMBA = frozenset(("in_proj", "x_proj", "dt_proj", "out_proj"))
register_architecture(Architecture("Mamba", ("mamba", "falcon_mamba"), unquantized=MAMBA))
register_architecture(Architecture("Jamba", ("jamba",), unquantized=MAMBA))
register_architecture(
    Architecture(
        "Falcon-H1",
        ("falcon_h1",),
        vllm_names={".qkv_proj": ".self_attn.qkv_proj", ".o_proj": ".self_attn.o_proj"},
        unquantized=MAMBA,
        proven=True,
    )
)

BERT = Architecture(
    "BERT",
    ("bert",),
    auto_class="AutoModelForMaskedLM",
    fused=(("query", "key", "value"),),
    row_parallel=frozenset(("output.dense",)),
    routers=(),
    vllm_names={"attention.output.qkv_proj": "attention.self.qkv_proj"},
    loss=SAME_TOKEN,
    only_blocks=True,
    proven=True,
)
register_architecture(BERT)
register_architecture(
    replace(
        BERT,
        name="RoBERTa",
        model_types=("roberta", "xlm-roberta"),
        vllm_names={**BERT.vllm_names, "^bert.": "roberta."},
        added_config={"position_embedding_type": "absolute"},
    )
)
register_architecture(
    replace(
        BERT,
        name="ModernBERT",
        model_types=("modernbert",),
        fused=(),
        row_parallel=frozenset(("Wo",)),
        vllm_names={"^modernbert.encoder_layer.": "model."},
    )
)
ROPE = replace(
    BERT,
    name="NomicBERT",
    model_types=("nomic_bert",),
    fused=GENERIC.fused,
    row_parallel=frozenset(("o_proj", "down_proj")),
    vllm_names={
        "encoder.layer.": "encoder.layers.",
        "attention.qkv_proj": "attn.qkv_proj",
        "attention.dense": "attn.out_proj",
    },
)
register_architecture(ROPE)
register_architecture(
    replace(
        ROPE, name="GTE", model_types=("gte",), added_config={"position_embedding_type": "rope"}
    )
)
VISION = "gemma3 llava mistral3 qwen2_5_vl qwen2_vl qwen3_vl"
"""A language model with a vision tower beside it, compared by text alone."""
register_architecture(Architecture("vision-language", tuple(VISION.split()), proven=True))


def prunable_types() -> list[str]:
    """Model types that can be pruned."""
    return [name for name, row in _ROWS.items() if row.prunable]


def proven_types() -> set[str]:
    """Model types whose serving has been compared with transformers."""
    return {name for name, row in _ROWS.items() if row.proven}

"""Layers of compressed experts against the sum over experts in plain torch: any format, any rank
of tensor or expert parallelism, and every line that says why one is not served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_compress.config import CompressConfig
from vllm_compress.kernels import experts as products
from vllm_compress.layers.experts import CompressedExperts
from vllm_compress.targets import Target

EXPERTS, HIDDEN, INNER = 5, 128, 256
FORMATS: list[Format] = [
    Integer(bits=4, group_size=32),
    Integer(bits=3, group_size=64, symmetric=False),
    Integer(bits=8, group_size=-1),
    Integer(bits=8, group_size=-1, activations="int8"),
    Lookup(bits=3, group_size=64),
    Sparse(32, 64, Integer(bits=8, group_size=-1)),
    Rotated(Integer(bits=4, group_size=32), block=32),
    LowRank(8, Integer(bits=4, group_size=32)),
]
SHARDS = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
Stored = dict[tuple[int, str], dict[str, Tensor]]


def packed(fmt: Format, last: Format | None = None) -> tuple[dict[Any, Target], Stored]:
    """Targets and tensors of random experts; their last matrices may be in another format."""
    torch.manual_seed(0)
    targets, tensors = {}, {}
    for expert in range(EXPERTS):
        for shard, shape in SHARDS.items():
            mine = last if last is not None and shard == "w2" else fmt
            targets[expert, shard] = Target(f"experts.{expert}.{shard}", shape, mine)
            weight = torch.randn(shape) * shape[1] ** -0.5
            tensors[expert, shard] = mine.pack(mine.nearest(weight))
    return targets, tensors


class Layer(nn.Module):
    """What the method asks of vLLM's; `held` are this rank's experts."""

    def __init__(self, held: list[int], **changes: Any) -> None:
        super().__init__()
        self.held = held
        self.activation = changes.get("activation", MoEActivation.SILU)
        self.apply_router_weight_on_input = changes.get("on_input", False)
        self.expert_map = None
        if len(held) < EXPERTS:
            places = [held.index(e) if e in held else -1 for e in range(EXPERTS)]
            self.expert_map = torch.tensor(places, dtype=torch.int32)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return self.held.index(expert) if expert in self.held else -1


def method(targets: Any, rank: int = 0, ranks: int = 1, **changes: Any) -> CompressedExperts:
    settings = {"tp_rank": rank, "tp_size": ranks, "swiglu_limit": None, "has_bias": False}
    return CompressedExperts(targets, SimpleNamespace(**{**settings, **changes}))


def load(layer: Layer, made: CompressedExperts, tensors: Stored) -> None:
    """As vLLM's loader does: each stored tensor to the parameter of its prefixed name."""
    for (expert, shard), found in tensors.items():
        for name, tensor in found.items():
            whole = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
            loader = layer.get_parameter(whole).weight_loader
            success = loader(
                layer.get_parameter(whole), tensor, whole, shard, expert, return_success=True
            )
            assert success == (expert in layer.held)


def served(
    targets: Any,
    tensors: Stored,
    inputs: tuple[Tensor, Tensor, Tensor],
    rank: int = 0,
    ranks: int = 1,
    held: list[int] | None = None,
    **changes: Any,
) -> Tensor:
    """What one rank's layer computes."""
    layer = Layer(list(range(EXPERTS)) if held is None else held, **changes)
    made = method(targets, rank, ranks)
    made.create_weights(layer, len(layer.held), HIDDEN, INNER // ranks, inputs[0].dtype)
    load(layer, made, tensors)
    made.process_weights_after_loading(layer)
    made.process_weights_after_loading(layer)  # vLLM may ask twice
    assert all(name.startswith("experts_") for name, _ in layer.named_parameters())
    return made.apply(layer, *inputs)


def routed(tokens: int, choices: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    x = torch.randn(tokens, HIDDEN, dtype=dtype)
    scores, chosen = torch.rand(tokens, EXPERTS).topk(choices, dim=-1)
    return x, scores, chosen.to(torch.int32)


def expected(targets: Any, tensors: Stored, inputs: Any, on_input: bool = False) -> Tensor:
    x, scores, chosen = inputs
    weights = {at: t.format.unpack(tensors[at]) for at, t in targets.items()}
    out = torch.zeros(x.shape)
    for token, (mine, experts) in enumerate(zip(scores, chosen.tolist(), strict=True)):
        for score, expert in zip(mine, experts, strict=True):
            given = (x[token].float() * (score if on_input else 1))[None]
            first = targets[expert, "w1"].format.quantize_activations(given)
            gate, up = (first @ weights[expert, shard].T for shard in ("w1", "w3"))
            inner = functional.silu(gate) * up
            inner = targets[expert, "w2"].format.quantize_activations(inner)
            out[token] += (inner @ weights[expert, "w2"].T)[0] * (1 if on_input else score)
    return out


def check(found: Tensor, aim: Tensor, bound: float) -> None:
    assert found.shape == aim.shape
    assert (found.float() - aim).norm() <= bound * aim.norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.describe())
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kernel", ["reference", None])
def test_a_layer_is_the_sum_over_its_experts(
    fmt: Format, tokens: int, kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:
        monkeypatch.setenv("VLLM_COMPRESS_KERNEL", kernel)
    targets, tensors = packed(fmt)
    inputs = routed(tokens)
    aim = expected(targets, tensors, inputs)
    check(served(targets, tensors, inputs), aim, 1e-3 if kernel else 0.03)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fmt", FORMATS[:6], ids=lambda f: f.describe())
def test_ranks_add_up(fmt: Format, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_KERNEL", "reference")
    targets, tensors = packed(fmt)
    inputs = routed(7, 3)
    aim = expected(targets, tensors, inputs)
    total = sum(served(targets, tensors, inputs, rank, ranks) for rank in range(ranks))
    exact = getattr(fmt, "activations", None) is None or ranks == 1
    check(total, aim, 1e-3 if exact else 0.02)  # each rank rounds its own part of a token
    shares = [served(targets, tensors, inputs, held=held) for held in ([3, 1], [0, 2, 4])]
    check(sum(shares), aim, 1e-3)


def test_scores_may_multiply_what_experts_get() -> None:
    targets, tensors = packed(FORMATS[2])
    inputs = routed(6, 1)
    found = served(targets, tensors, inputs, on_input=True)
    check(found, expected(targets, tensors, inputs, on_input=True), 0.03)
    assert (found - expected(targets, tensors, inputs)).norm() > 0.1 * found.norm()


def test_biases_are_added_to_both_products() -> None:
    """Of GPT-OSS, whose gates and what they gate take turns in the bias."""
    targets, tensors = packed(Integer(bits=8, group_size=32))
    x, scores, chosen = routed(6)
    first, last = torch.randn(EXPERTS, 2 * INNER), torch.randn(EXPERTS, HIDDEN)
    layer = Layer(list(range(EXPERTS)), activation=MoEActivation.SWIGLUOAI)
    made = method(targets, has_bias=True)
    made.create_weights(layer, EXPERTS, HIDDEN, INNER, torch.float32)
    names = dict(layer.named_parameters())
    for (expert, shard), found in tensors.items():
        for name, tensor in found.items():  # as the loader of a model does that knows whole names
            parameter = names[f"{expert}.{shard}.{name}"]
            parameter.weight_loader(parameter, tensor)
    names["w13_bias"].data.copy_(first)
    names["w2_bias"].data.copy_(last)
    made.process_weights_after_loading(layer)
    aim = torch.zeros_like(x)
    for token, (mine, experts) in enumerate(zip(scores, chosen.tolist(), strict=True)):
        for score, expert in zip(mine, experts, strict=True):
            gate, up, down = (
                targets[expert, shard].format.unpack(tensors[expert, shard])
                for shard in ("w1", "w3", "w2")
            )
            gated = gate @ x[token] + first[expert, ::2], up @ x[token] + first[expert, 1::2]
            inner = products.ACTIVATIONS["swigluoai"](torch.cat(gated))
            aim[token] += score * (down @ inner + last[expert])
    check(made.apply(layer, x, scores, chosen), aim, 1e-3)


def test_16_bit_activations_stay_so() -> None:
    targets, tensors = packed(FORMATS[0])
    inputs = routed(6, dtype=torch.bfloat16)
    found = served(targets, tensors, inputs)
    assert found.dtype == torch.bfloat16
    check(found, expected(targets, tensors, inputs), 0.04)


def test_experts_may_differ_in_format_and_are_then_kept_apart() -> None:
    targets, tensors = packed(FORMATS[0], FORMATS[2])
    other = Integer(bits=8, group_size=32)
    for shard in ("w1", "w3"):
        targets[2, shard] = Target(f"experts.2.{shard}", SHARDS[shard], other)
        tensors[2, shard] = other.pack(other.nearest(torch.randn(SHARDS[shard]) / 10))
    inputs = routed(12)
    check(served(targets, tensors, inputs), expected(targets, tensors, inputs), 0.03)


@pytest.mark.parametrize("name", products.ACTIVATIONS)
def test_activations_are_vllms(name: str) -> None:
    from vllm.model_executor.layers import activation

    x = given = torch.randn(3, 64) * 6
    if name == "swigluoai":  # vLLM has gates and what they gate in turn
        x = torch.stack(given.chunk(2, 1), -1).flatten(1)
    named = MoEActivation.from_str(name)
    if named.is_gated:
        classes = {"silu": "SiluAndMul", "swigluoai": "SwigluOAIAndMul"}
        cls = classes.get(name, "GeluAndMul")
        kwargs = {"approximate": "tanh"} if name == "gelu_tanh" else {}
        with torch.device("cpu"):
            from vllm.config import VllmConfig, set_current_vllm_config

            with set_current_vllm_config(VllmConfig()):
                aim = getattr(activation, cls)(**kwargs).forward_native(x)
    else:
        out = torch.empty_like(x)
        from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation

        aim = apply_moe_activation(named, out, x.clone())
    assert torch.allclose(products.ACTIVATIONS[name](given), aim, atol=1e-5)


def test_the_op_is_known_to_the_compiler() -> None:
    targets, tensors = packed(FORMATS[0])
    layer, made = Layer(list(range(EXPERTS))), method(targets)
    made.create_weights(layer, EXPERTS, HIDDEN, INNER, torch.float32)
    load(layer, made, tensors)
    made.process_weights_after_loading(layer)
    assert len(made.names) <= 6  # of five experts
    stored = [getattr(layer, name) for name in made.names]
    torch.library.opcheck(
        torch.ops.vllm_compress.experts.default,
        (*routed(4), stored, [], None, made.plan),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_is_missing_or_wrong_is_one_line() -> None:
    targets, tensors = packed(FORMATS[0])
    layer, made = Layer(list(range(EXPERTS))), method(targets)
    made.create_weights(layer, EXPERTS, HIDDEN, INNER, torch.float32)
    del tensors[3, "w3"]["weight_scales"]
    load(layer, made, tensors)
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight_scales is missing"):
        made.process_weights_after_loading(layer)
    with pytest.raises(CheckpointError, match=r"compressed as \[256, 128\], .*'s is \[512, 128\]"):
        method(targets).create_weights(Layer([0]), 1, HIDDEN, 2 * INNER, torch.float32)
    with pytest.raises(CheckpointError, match=r"activation 'silu' and a limit are not served"):
        method(targets, swiglu_limit=7.0).create_weights(
            Layer([0]), 1, HIDDEN, INNER, torch.float32
        )
    with pytest.raises(CheckpointError, match=r"activation 'swiglustep' are not served, only silu"):
        method(targets).create_weights(
            Layer([0], activation=MoEActivation.SWIGLUSTEP), 1, HIDDEN, INNER, torch.float32
        )
    with pytest.raises(CheckpointError, match=r"256 columns in int4 g32 cannot be divided over 16"):
        method(targets, 0, 16).create_weights(Layer([0]), 1, HIDDEN, INNER // 16, torch.float32)


def test_of_a_layer_all_experts_are_compressed_or_none() -> None:
    targets, _ = packed(FORMATS[0])
    config: Any = SimpleNamespace(find=lambda name: named.get(name))
    layer = SimpleNamespace(
        ckpt_gate_proj_name="w1",
        ckpt_down_proj_name="w2",
        ckpt_up_proj_name="w3",
        moe_config=SimpleNamespace(num_logical_experts=EXPERTS),
    )
    named = {f"mlp.{t.module}": t for t in targets.values()}
    assert CompressConfig.experts(config, "mlp.experts", layer) == targets
    del named["mlp.experts.4.w2"]
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.4\.w2 is kept as it is, but experts"):
        CompressConfig.experts(config, "mlp.experts", layer)
    named.clear()
    assert CompressConfig.experts(config, "mlp.experts", layer) == {}

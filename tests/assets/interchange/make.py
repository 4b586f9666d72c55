"""Makes the checkpoints of this folder with the tools whose formats they are.

    python make.py KIND OUT      in an environment that has the tool of KIND and transformers

Every one is a random Llama of one layer; `expected.json` beside it holds log-probabilities of a
prompt in float32, with the weights that the tool itself dequantizes (from scales in float32, so
that what is compared is the format and not the rounding of a 16-bit product). README.md says which
versions made what is here.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = [5, 6, 7, 8, 9, 60, 20, 21, 22, 23, 50, 33, 3, 47, 15]
GROUP = 32


def base_model(width: int = 128) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # and no buffers: frequencies have to stay as they are
        parameter.data = parameter.data.bfloat16().float()
    return model


def projections(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            yield name, module


def finish(model: Any, out: Path, values: dict[str, Tensor], tool: str) -> None:
    """Log-probabilities of the model with the weights that the tool dequantized."""
    for name, module in projections(model):
        module.weight.data = values[name].float().reshape(module.weight.shape).contiguous()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    logprobs = scores.gather(1, ids[0, 1:, None])[:, 0].tolist()
    found = {"tool": f"{tool} {importlib.metadata.version(tool)}", "prompt": PROMPT}
    text = json.dumps({**found, "logprobs": [round(x, 6) for x in logprobs]}, indent=1)
    (out / "expected.json").write_text(text + "\n")


def write(
    model: Any, out: Path, packed: dict[str, dict[str, Tensor]], block: dict[str, Any]
) -> None:
    """config.json and model.safetensors with the tensors of a tool in place of each weight."""
    from safetensors.torch import save_file

    config = json.loads(model.config.to_json_string())
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": block}, indent=1))
    names = {f"{name}.weight" for name in packed}
    tensors = {
        name: tensor.bfloat16().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in names and name != "lm_head.weight"
    }
    for name, parts in packed.items():
        tensors |= {f"{name}.{leaf}": part.contiguous() for leaf, part in parts.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


# compressed-tensors: its own compressors, with scales that a minmax gives.


def compressed_tensors(kind: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        weights, form = CT[kind]
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(form)
        model, packed, values = base_model(), {}, {}
        for name, module in projections(model):
            state = ct_state(module.weight.data, args, kind)
            packed[name] = compressor.compress({**state, "weight": module.weight.data}, scheme)
            if kind == "nvfp4":  # whose compressor decompresses in bfloat16
                values[name] = nvfp4_values(packed[name])
            else:
                values[name] = compressor.decompress(dict(packed[name]), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        block = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {**group, "format": form}},
            "ignore": ["lm_head"],
        }
        write(model, out, packed, block)
        finish(model, out, values, "compressed-tensors")

    return make


ROW8 = {"num_bits": 8, "strategy": "channel"}
FLOAT4 = {"num_bits": 4, "type": "float"}
CT: dict[str, tuple[dict[str, Any], str]] = {
    "int4-actorder": (
        {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": GROUP,
            "symmetric": False,
            "actorder": "group",
        },
        "pack-quantized",
    ),
    "int8": ({**ROW8, "type": "int"}, "int-quantized"),
    "fp8": ({**ROW8, "type": "float"}, "float-quantized"),
    "nvfp4": ({**FLOAT4, "strategy": "tensor_group", "group_size": 16}, "nvfp4-pack-quantized"),
    "mxfp4": ({**FLOAT4, "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"),
}


def nvfp4_values(parts: dict[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, half = parts["weight_packed"].shape
    floats = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, torch.float32)
    scale, whole = parts["weight_scale"].float(), parts["weight_global_scale"]
    return dequantize(floats, scale, global_scale=whole, dtype=torch.float32)


def ct_state(weight: Tensor, args: Any, kind: str) -> dict[str, Tensor]:
    """Scales, zero points and whatever else a compressor wants beside a weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, cols = weight.shape
    extra: dict[str, Tensor] = {}
    size = args.group_size or cols
    ordered = weight
    if kind == "int4-actorder":
        order = torch.randperm(cols)
        group_of = torch.empty(cols, dtype=torch.int32)
        group_of[order] = torch.arange(cols, dtype=torch.int32) // size
        ordered, extra["weight_g_idx"] = weight[:, order], group_of
    groups = ordered.reshape(rows, -1, size)
    if kind == "nvfp4":
        extra["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        most = groups.abs().amax(-1) / 6 * extra["weight_global_scale"]
        return {"weight_scale": most.to(torch.float8_e4m3fn).float(), **extra}
    if kind == "mxfp4":
        return {"weight_scale": 2 ** (groups.abs().amax(-1) / 6).log2().ceil()}
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = scale.bfloat16().float()
    return {"weight_scale": scale, "weight_zero_point": zero, **extra}


# GPTQModel: its own packing, with scales that a minmax gives and columns in a random order.


def gptq(bits: int, version: str, **settings: Any) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        model, packed, values = base_model(), {}, {}
        second = version == "gptq_v2"
        for name, module in projections(model):
            rows, cols = module.weight.shape
            order = torch.randperm(cols) if settings["desc_act"] else torch.arange(cols)
            group_of = torch.empty(cols, dtype=torch.int32)
            group_of[order] = torch.arange(cols, dtype=torch.int32) // GROUP
            groups = module.weight.data[:, order].reshape(rows, -1, GROUP)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scales = ((high - low) / (2**bits - 1)).half().float()
            zeros = (-low / scales).round()
            if settings["sym"]:
                scales = (groups.abs().amax(-1) * 2 / (2**bits - 1)).half().float()
                zeros = torch.full_like(scales, 2 ** (bits - 1))
            layer = TorchLinear(
                bits=bits, group_size=GROUP, in_features=cols, out_features=rows, bias=False,
                pack_dtype=torch.int32, register_buffers=True, **settings,
            )  # fmt: skip
            layer.pack(module, scales, zeros, group_of)
            layer.post_init()
            layer.scales = layer.scales.float()
            values[name] = layer.dequantize_weight().T
            leaves = ("qweight", "qzeros", "scales", "g_idx")
            stored = {leaf: getattr(layer, leaf).clone() for leaf in leaves}
            stored["scales"] = stored["scales"].half()
            packed[name] = stored if second else first_version(stored, bits)
        block = {
            "quant_method": "gptq", "bits": bits, "group_size": GROUP,
            "checkpoint_format": version, **settings,
        }  # fmt: skip
        write(model, out, packed, block)
        finish(model, out, values, "gptqmodel")

    return make


def first_version(stored: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Zero points less one, which is what the tool does to `qzeros` before it saves them."""
    words = stored["qzeros"].to(torch.int64) & 0xFFFFFFFF
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return {**stored, "qzeros": (words - ones).to(torch.int32)}


def awq(out: Path) -> None:
    """AutoAWQ's own packing of its own pseudo-quantization, without its search of scales."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    model, packed, values = base_model(), {}, {}
    for name, module in projections(model):
        groups = module.weight.data.reshape(len(module.weight), -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low).clamp(min=1e-5) / 15).half().float()
        zeros = (-(low / scales).round()).clamp(0, 15)
        layer = WQLinear_GEMM.from_linear(
            module, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        leaves = ("qweight", "qzeros", "scales")
        packed[name] = {leaf: getattr(layer, leaf) for leaf in leaves}
        scales = layer.scales.float()
        values[name] = dequantize_gemm(layer.qweight, layer.qzeros, scales, 4, GROUP).T
    block = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP}
    write(model, out, packed, {**block, "zero_point": True})
    finish(model, out, values, "autoawq")


def bitsandbytes(settings: dict[str, Any]) -> Callable[[Path], None]:
    """Saved by transformers, quantized by bitsandbytes on the CPU."""

    def make(out: Path) -> None:
        import bitsandbytes as bnb
        import transformers

        base_model().bfloat16().save_pretrained(out / "plain")
        config = transformers.BitsAndBytesConfig(**settings)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            out / "plain", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
        )
        quantized.save_pretrained(out)
        values = {}
        for name, module in projections(quantized):
            weight = module.weight
            if settings.get("load_in_4bit"):
                state = weight.quant_state
                state.dtype = torch.float32
                values[name] = bnb.functional.dequantize_4bit(weight.data, state)
            else:
                scales = module.state.SCB if weight.SCB is None else weight.SCB
                values[name] = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
        for path in (*(out / "plain").iterdir(), out / "generation_config.json"):
            path.unlink(missing_ok=True)
        (out / "plain").rmdir()
        finish(base_model(), out, values, "bitsandbytes")

    return make


def hqq(out: Path) -> None:
    """HQQ's own layers and state, as its `encoded_state_dict` names the tensors."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, packed, values = base_model(), {}, {}
    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for name, module in projections(model):
        layer = HQQLinear(
            module, settings, compute_dtype=torch.bfloat16, device="cpu", del_orig=False
        )
        state = layer.state_dict()
        packed[name] = {leaf: part for leaf, part in state.items() if part is not None}
        layer.meta["compute_dtype"] = torch.float32
        values[name] = layer.dequantize()
    block = {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}
    write(model, out, packed, block)
    finish(model, out, values, "hqq")


def gguf(kind: str) -> Callable[[Path], None]:
    """Written and quantized by llama.cpp's Python package, with the order of rows that its
    converter gives q and k; expected by transformers, which dequantizes with the same package."""

    def make(out: Path) -> None:
        import gguf
        import transformers

        model = base_model()
        config = model.config
        path = out / f"model.{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        tokens = [chr(33 + place) for place in range(config.vocab_size - 1)]
        tokens.append(tokens[0] + tokens[1])  # what the one merge makes
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight":
                continue
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                pairs = tensor.unflatten(0, (heads[name[-13]], 2, -1))
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
            asked = getattr(gguf.GGMLQuantizationType, kind if tensor.dim() > 1 else "F32")
            data = gguf.quantize(tensor.numpy(), asked)
            theirs = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(theirs, data, raw_dtype=asked)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            out, gguf_file=path.name, dtype=torch.float32
        )
        values = {name: module.weight.data for name, module in projections(loaded)}
        finish(loaded, out, values, "gguf")

    return make


KINDS: dict[str, Callable[[Path], None]] = {
    **{f"compressed-tensors-{kind}": compressed_tensors(kind) for kind in CT},
    "gptq-desc-act": gptq(4, "gptq", desc_act=True, sym=False),
    "gptq-v2-3bit": gptq(3, "gptq_v2", desc_act=False, sym=True),
    "awq": awq,
    "bitsandbytes-nf4": bitsandbytes(
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    ),
    "bitsandbytes-int8": bitsandbytes({"load_in_8bit": True}),
    "hqq": hqq,
    "gguf-q4_0": gguf("Q4_0"),
    "gguf-q5_1": gguf("Q5_1"),
}


if __name__ == "__main__":
    chosen, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[chosen](folder)

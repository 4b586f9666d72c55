"""compressed-tensors as a result: which of its forms a format of ours is, and that form's tensors.

    integer, weights alone, 2, 4 or 8 bits   pack-quantized
    integer of 8 bits, int8 activations      int-quantized
    float fp8, rows or blocks                float-quantized
    float mxfp4                              mxfp4-pack-quantized

What is written is read by vLLM without this plugin, and by transformers where compressed-tensors is
installed. `nvfp4` of ours has a scale for each row, theirs one of the tensor, so it has no equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.interchange.parts.words import WORD, pack_words
from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.errors import FormatError
from compress_methods.formats import Format, Stored, TensorSpec
from compress_methods.formats.encoding.small_floats import encode_e8m0
from compress_methods.formats.floats import FP8, MXFP4, Float
from compress_methods.formats.integer import Integer
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compressed-tensors"
PACKED, INTEGERS, FLOATS, MICROSCALED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp4-pack-quantized",
)
KV_CACHE = {
    **{"num_bits": 8, "type": "float", "strategy": "tensor"},
    **{"dynamic": False, "symmetric": True},
}
BITS = (2, 4, 8)


def form_of(module: str, fmt: Format) -> str:
    """Its name; `FormatError` where there is none."""
    if isinstance(fmt, Integer) and fmt.holds_zero:
        if fmt.activations is None and fmt.bits in BITS:
            return PACKED
        if fmt.activations is not None and fmt.bits == 8 and fmt.group_size < 0:
            return INTEGERS
    if isinstance(fmt, Float) and fmt.kind == MXFP4:
        return MICROSCALED
    if isinstance(fmt, Float) and fmt.kind == FP8 and (fmt.group_size < 0 or fmt.group_rows > 1):
        return FLOATS
    raise FormatError(f"{module}: {fmt.describe()} has no equal in {NAME}")


def specs(module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
    """Full names and shapes."""
    form = form_of(module, fmt)
    fmt.check_shape(rows, cols)
    assert isinstance(fmt, Integer | Float)
    groups = fmt.groups(cols)
    if isinstance(fmt, Float):
        rows_of_scales = -(-rows // fmt.group_rows)
        scale = "uint8" if form == MICROSCALED else "float32"
        found = {"weight_scale": TensorSpec((rows_of_scales, groups), scale)}
        if form == MICROSCALED:
            found["weight_packed"] = TensorSpec((rows, cols // 2), "uint8")
        else:
            found["weight"] = TensorSpec((rows, cols), "float8_e4m3fn")
    else:
        each = WORD // fmt.bits
        found = {"weight_scale": TensorSpec((rows, groups), fmt.scale_dtype)}
        if form == INTEGERS:
            found["weight"] = TensorSpec((rows, cols), "int8")
        else:
            found["weight_packed"] = TensorSpec((rows, -(-cols // each)), "int32")
            found["weight_shape"] = TensorSpec((2,), "int64")
        if not fmt.symmetric:
            shape, dtype = (-(-rows // each), groups), "int32"
            found["weight_zero_point"] = (
                TensorSpec((rows, groups), "int8") if form == INTEGERS else TensorSpec(shape, dtype)
            )
    return {f"{module}.{leaf}": spec for leaf, spec in found.items()}


def write(module: str, stored: Stored) -> dict[str, Tensor]:
    """Those tensors of a stored matrix."""
    fmt, form = stored.format, form_of(module, stored.format)
    solution = fmt.solution(stored.tensors)
    if isinstance(fmt, Float):
        codes, scales = solution.codes, solution.scales
        found = {"weight_scale": encode_e8m0(scales) if form == MICROSCALED else scales.float()}
        if form == MICROSCALED:
            found["weight_packed"] = codes[:, ::2] | (codes[:, 1::2] << 4)
        else:
            found["weight"] = codes.view(torch.float8_e4m3fn)
        return {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in found.items()}
    assert isinstance(fmt, Integer)
    found, zeros = {"weight_scale": solution.scales}, solution.zeros
    if form == INTEGERS:
        found["weight"] = (solution.codes.short() - 128).to(torch.int8)
        if zeros is not None:
            found["weight_zero_point"] = (zeros.short() - 128).to(torch.int8)
    else:
        found["weight_packed"] = pack_words(solution.codes, fmt.bits)
        found["weight_shape"] = torch.tensor(stored.shape)
        if zeros is not None:
            found["weight_zero_point"] = pack_words(zeros.T, fmt.bits).T
    return {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in found.items()}


def config(spec: CompressionSpec) -> dict[str, Any]:
    """A group of `config_groups` for every format, whose targets are patterns of whole names."""
    groups = {}
    for place, (name, fmt) in enumerate(spec.formats.items()):
        mine = [rule.match for rule in spec.modules if rule.format == name]
        group = _scheme(fmt)
        group["targets"] = [f"{m}$" if m.startswith("re:") else m for m in mine]
        groups[f"group_{place}"] = group
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": NAME,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        **({} if spec.kv_cache is None else {"kv_cache_scheme": dict(KV_CACHE)}),
    }


def _scheme(fmt: Format) -> dict[str, Any]:
    form = form_of("the result", fmt)
    assert isinstance(fmt, Integer | Float)
    blocks = isinstance(fmt, Float) and fmt.group_rows > 1
    strategy = "block" if blocks else "channel" if fmt.group_size < 0 else "group"
    kind = "float" if isinstance(fmt, Float) else "int"
    weights: dict[str, Any] = {"num_bits": fmt.bits, "type": kind, "symmetric": fmt.symmetric}
    weights |= {"strategy": strategy, "dynamic": False}
    if strategy == "group":
        weights["group_size"] = fmt.group_size
    if isinstance(fmt, Float) and blocks:
        weights["block_structure"] = [fmt.group_rows, fmt.group_size]
    inputs = None
    if fmt.activations is not None:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True}
        inputs |= {"strategy": "group", "group_size": 128} if blocks else {"strategy": "token"}
    return {"weights": weights, "input_activations": inputs, "format": form}

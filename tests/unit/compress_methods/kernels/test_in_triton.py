"""Products in Triton: in its interpreter, which needs no GPU; tests/gpu has the compiled ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress_methods.formats import Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.kernels import Want, choose, kernel
from tests.unit.compress_methods.kernels.arithmetic import interpret

INTERPRETED = """
import torch
from compress_methods.formats import Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from compress_methods.kernels import Want, embed, matmul, prepare
from compress_methods.kernels.triton import product

torch.manual_seed(0)
product.SLAB_ELEMENTS = 1024  # more than one slab
INT8 = Integer(8, -1)
CASES = [
    (Integer(2, 128, levels="mid"), 40, 128, torch.float32),
    (Integer(3, 32), 24, 96, torch.float16),
    (Integer(4, -1, symmetric=False), 20, 96, torch.float32),
    (Integer(4, 64, symmetric=False), 20, 128, torch.float32),
    (Integer(5, 128), 9, 128, torch.float32),
    (Integer(6, -1, activations="int8"), 9, 96, torch.float32),
    (INT8, 33, 160, torch.float16),
    (Lookup(2, 64, table_rows=1), 20, 64, torch.float32),
    (Lookup(3, 128), 40, 128, torch.float32),
    (Lookup(4, -1, "nf4"), 20, 96, torch.float32),
    (Lookup(4, 64, "bnb_nf4", scale_dtype="float32"), 20, 128, torch.float32),
    (Float("fp8"), 9, 80, torch.float32),
    (Float("fp8", 128, 128), 140, 128, torch.float32),
    (Float("mxfp4"), 9, 96, torch.float16),
    (Float("nvfp4"), 9, 96, torch.float32),
    (Trellis(2), 20, 80, torch.float32),
    (Trellis(3, 9, 32), 20, 64, torch.float32),
    (Sparse(2, 4, INT8), 20, 128, torch.float32),
    (Sparse(64, 128, Integer(4, 64, symmetric=False)), 20, 256, torch.float32),
    (Sparse(6, 8, Dense("bfloat16")), 9, 40, torch.float32),
    (Sparse(8, 16, Lookup(4, 32, "nf4")), 9, 64, torch.float32),
]
for fmt, rows, cols, dtype in CASES:
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(rows, cols))), (rows, cols))
    prepared = prepare(stored, Want(kernel="triton", embed=True))
    assert prepared.kernel == "triton"
    x, bias = torch.randn(130, cols).to(dtype), torch.randn(rows).to(dtype)
    inputs = fmt.quantize_activations(x).double()
    values = stored.values().double()
    exact, size = inputs @ values.T + bias, inputs.abs() @ values.abs().T + bias.abs()
    limit = 1e-6 if dtype == torch.float32 else 2**-10
    for tokens in (3, 130):  # decoded tile by tile, and beforehand
        out = matmul(x[:tokens], prepared, bias)
        assert out.dtype == dtype
        # Scales round the values in 16 bits, if they are decoded beforehand.
        most = limit if tokens == 3 else limit * 2
        worst = float(((out.double() - exact[:tokens]).abs() / size[:tokens]).max())
        assert worst < most, (fmt.describe(), tokens, worst)
    ids = torch.tensor([rows - 1, 0, 5, 5])
    found = embed(ids, prepared, torch.float32)
    torch.testing.assert_close(found, stored.values()[ids], rtol=1e-6, atol=0)
fmt = LowRank(5, Integer(4, 64))
stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(20, 128))), (20, 128))
prepared = prepare(stored, Want(kernel="triton"))
assert (prepared.kernel, prepared.parts[0].kernel) == ("lowrank", "triton")
for tokens in (3, 20):  # in one launch, and apart
    x, bias = torch.randn(tokens, 128), torch.randn(20)
    found = matmul(x, prepared, bias)
    torch.testing.assert_close(found, x @ stored.values().T + bias, rtol=1e-5, atol=1e-4)
piece = Stored.whole(INT8, INT8.pack(INT8.nearest(torch.randn(64, 256))), (64, 256))
piece = piece.cut(rows=(7, 50), cols=(32, 224))
x = torch.randn(20, 192)
found = matmul(x, prepare(piece, Want(kernel="triton")))
torch.testing.assert_close(found, x @ piece.values().T, rtol=1e-5, atol=1e-4)
print("the same")
"""


def test_products_in_triton_are_those_of_the_values() -> None:
    interpret(INTERPRETED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "constants", "data", "n", "rank"),
    [
        ("affine", (4, 128, 128, -1), ("*u8", "*u8"), 0, 16),
        ("table", (3, 128, 16), ("*u8", "*i8"), 0, 0),
        ("trellis", (2, 12), ("*u8",), 0, 0),
        ("affine", (8, 32, 0, 256), ("*u8",), 64, 0),
    ],
)
def test_products_compile_for_a_gpu(
    decoder: str, constants: tuple[int, ...], data: tuple[str, ...], n: int, rank: int
) -> None:
    """With tensor cores; what the interpreter lets pass, the compiler may not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compress_methods.kernels.triton import decoders, product

    m, step = (128, 128) if n else (0, 64)
    constant: dict[str, Any] = {"DECODE": getattr(decoders, decoder), "FORMAT": constants}
    constant |= {"N": n, "M": m, "GROUP": 0, "SCALED": True, "RANK": rank, "WIDE": 16}
    constant |= {"BM": 16, "BN": product.ROWS, "BK": step}
    pointers: dict[str, Any] = {"x": "*bf16", "out": "*fp32", "data": data, "scales": "*bf16"}
    pointers |= {"mask": "*u8"} if n else {}
    pointers |= {"left": "*bf16", "inner": "*bf16"} if rank else {}
    constant |= {name: None for name in ("mask", "left", "inner") if name not in pointers}
    signature = pointers | dict.fromkeys(("tokens", "rows", "cols", "steps"), "i32")
    signature |= dict.fromkeys(constant, "constexpr")
    source = ASTSource(fn=product.multiply_tiles, signature=signature, constexprs=constant)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert "mma.sync" in made.asm["ptx"]


def test_triton_takes_over_from_the_reference_on_gpus() -> None:
    """On the CPU only where it is asked for by name; matrices kept as they are never."""
    pytest.importorskip("triton")
    fmt = Integer(4, 128)
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(8, 128))), (8, 128))
    ours = kernel("triton")
    assert choose(stored).name != "triton"
    assert ours.rank(stored, Want()) is None
    assert ours.rank(stored, Want(kernel="triton")) == 200
    plain = Dense("bfloat16")
    kept = Stored.whole(plain, plain.pack(plain.nearest(torch.randn(8, 128))), (8, 128))
    assert ours.rank(kept, Want(kernel="triton")) is None

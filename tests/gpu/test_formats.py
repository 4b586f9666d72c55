"""On a GPU formats multiply and look rows up as on the CPU: what vLLM has no kernel for runs so."""

from __future__ import annotations

import pytest
import torch

from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.tensor_train import TensorTrain
from compress_methods.formats.trellis import Trellis
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.kernels import Want, embed, matmul, prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")
FORMATS = [
    *(Integer(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (-1, 128)),
    Integer(4, 32, symmetric=False),
    Integer(2, 128, levels="mid"),
    Integer(8, -1, activations="int8"),
    *(Lookup(bits, 128) for bits in (2, 3, 4)),
    Lookup(4, 64, "nf4"),
    *(Float(kind) for kind in ("fp8", "mxfp8", "mxfp4", "nvfp4")),
    Float("fp8", 128, 128),
    Trellis(2),
    Trellis(4, 16, 128),
    LowRank(16, Integer(4, 128)),
    Sparse(2, 4, Integer(8, -1)),
    Sparse(64, 128, Integer(4, 128)),
    Sparse(64, 128, Dense("bfloat16")),
    Sparse(6, 8, Dense("bfloat16")),
    Sparse(8, 16, Lookup(4, 64, "nf4")),
    Rotated(Integer(4, 128)),
    Rotated(Integer(8, -1, activations="int8"), block=512),
    TensorTrain(4),
    TensorTrain(16, "table"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 256])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_and_rows_are_those_of_the_cpu(
    fmt: Format, tokens: int, dtype: torch.dtype
) -> None:
    rows, cols = 320, 1024
    stored = fmt.pack(fmt.nearest(torch.randn(rows, cols)))
    values, on_gpu = fmt.unpack(stored), Stored.whole(fmt, stored, (rows, cols)).to(GPU)
    assert torch.equal(on_gpu.values().cpu(), values)
    prepared = prepare(on_gpu)
    assert {t.device.type for t in prepared.tensors} == {"cuda"}
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    out = matmul(x.to(GPU), prepared, bias.to(GPU))
    assert (out.dtype, out.device.type, out.shape) == (dtype, "cuda", (tokens, rows))
    inputs = fmt.quantize_activations(x.float())
    exact = inputs @ values.T + bias.float()
    size = inputs.abs() @ values.abs().T + bias.float().abs()
    tolerance = 2**-10 if dtype == torch.float32 else 2**-6  # of TF32, and of 16 bits
    assert bool(((out.cpu().float() - exact).abs() <= tolerance * size).all())
    ids = torch.randint(rows, (7,))
    found = embed(ids.to(GPU), prepare(on_gpu, Want(embed=True)), torch.float32)
    torch.testing.assert_close(found.cpu(), values[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_graph_records_products_and_look_ups(fmt: Format) -> None:
    """What is recorded may neither wait for the device nor ask it for a size."""
    rows, cols = 320, 1024
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(rows, cols))), (rows, cols)).to(GPU)
    prepared, table = prepare(stored), prepare(stored, Want(embed=True))
    x = torch.randn(3, cols, device=GPU, dtype=torch.bfloat16)
    ids = torch.randint(rows, (5,), device=GPU)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return matmul(x, prepared), embed(ids, table, torch.bfloat16)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before anything is recorded
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    x.normal_()
    ids.random_(rows)
    graph.replay()
    for found, expected in zip(recorded, step(), strict=True):
        assert torch.equal(found, expected)

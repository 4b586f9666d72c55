"""What the plugin does with stored tensors before and while vLLM runs on them: cutting them for a
rank, joining fused parts, the two torch ops, and vLLM's own kernel layout."""

from __future__ import annotations

import pytest
import torch

from compress_methods.errors import CheckpointError
from compress_methods.formats import Format, Stored
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.kernels import Want, dispatch, rebuild

pytest.importorskip("vllm")

from vllm_compress.kernels import ops, runtime
from vllm_compress.layers import collector as collecting
from vllm_compress.layers.geometry import Geometry, Segment
from vllm_compress.targets import Target

FORMATS = [
    Integer(bits=4, group_size=32),
    Integer(bits=3, group_size=64, symmetric=False),
    Integer(bits=8, group_size=-1),
    Sparse(32, 64, Integer(bits=8, group_size=-1)),
    Rotated(Integer(bits=4, group_size=32), block=32),
]


def packed(fmt: Format, rows: int, cols: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return fmt.pack(fmt.nearest(torch.randn(rows, cols)))


def stored(fmt: Format, rows: int, cols: int, seed: int = 0) -> Stored:
    return Stored.whole(fmt, packed(fmt, rows, cols, seed), (rows, cols))


def qkv(rank: int, ranks: int, heads: int = 4, kv_heads: int = 2, width: int = 32) -> Geometry:
    """What vLLM's QKV layer holds: key-value heads are copied where ranks outnumber them."""
    mine, kv = heads // ranks, max(1, kv_heads // ranks)
    kv_rank = rank // max(1, ranks // kv_heads)
    segments = [Segment("q", heads * width, rank * mine * width, mine * width)]
    for name in ("k", "v"):
        segments.append(Segment(name, kv_heads * width, kv_rank * kv * width, kv * width))
    return Geometry(tuple(segments), 128, (0, 128))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.describe())
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stored_fused", [False, True])
def test_a_rank_holds_its_rows_of_every_part(fmt: Format, ranks: int, stored_fused: bool) -> None:
    whole = [stored(fmt, rows, 128, seed) for seed, rows in enumerate((128, 64, 64))]
    values = [matrix.values() for matrix in whole]
    (fused,) = runtime.join(whole)
    for rank in range(ranks):
        geometry = qkv(rank, ranks)
        collector = collecting.Collector(
            [Target("qkv", (256, 128), fmt)]
            if stored_fused
            else [Target(n, (len(v), 128), fmt) for n, v in zip("qkv", values, strict=True)]
        )
        apart = {name: matrix.tensors for name, matrix in zip("qkv", whole, strict=True)}
        collector.found = {None: fused.tensors} if stored_fused else apart
        pieces = []
        for target, covered, tensors in collector.matrices(geometry):
            collecting.check(target, tensors)
            pieces += collecting.cut(target, tensors, geometry.row_ranges(covered), (0, 128))
        (joined,) = runtime.join(pieces)
        expected = torch.cat(
            [v[s.start : s.start + s.size] for v, s in zip(values, geometry.segments, strict=True)]
        )
        assert joined.size == (len(expected), 128)
        assert torch.equal(joined.values(), expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.describe())
def test_row_parallel_ranks_add_up(fmt: Format) -> None:
    tensors, x = packed(fmt, 64, 256), torch.randn(5, 256)
    target, total = Target("down", (64, 256), fmt), 0
    for rank in range(2):
        columns = (rank * 128, (rank + 1) * 128)
        collecting.check_cuts(target, [(0, 64)], columns, 2)
        pieces = collecting.cut(target, tensors, [(0, 64)], columns)
        prepared = runtime.prepare(pieces, Want())
        total = total + torch.ops.vllm_compress.linear(
            x[:, columns[0] : columns[1]], prepared.flat(), None, prepared.text()
        )
    expected = x @ fmt.unpack(tensors).T
    assert torch.allclose(total, expected, atol=0.02 * expected.abs().max().item())


def test_a_cut_inside_a_group_is_refused_by_name() -> None:
    target = Target("model.layers.0.mlp.down_proj", (64, 384), Integer(bits=4, group_size=128))
    with pytest.raises(
        CheckpointError, match=r"down_proj: 384 columns in int4 g128 cannot be"
    ) as e:
        collecting.check_cuts(target, [(0, 64)], (0, 192), 2)
    assert "smaller group_size" in str(e.value)


def test_a_cut_inside_a_sparse_block_is_refused_by_name() -> None:
    fmt = Sparse(64, 128, Integer(bits=8, group_size=-1))
    target = Target("model.layers.0.mlp.down_proj", (64, 384), fmt)
    with pytest.raises(CheckpointError, match=r"384 columns in 64:128 int8 row cannot be") as e:
        collecting.check_cuts(target, [(0, 64)], (0, 192), 2)
    assert "multiples of 128" in str(e.value)


def test_a_cut_inside_a_rotated_block_is_refused_by_name() -> None:
    fmt = Rotated(Integer(bits=4, group_size=64), block=128)
    target = Target("model.layers.0.mlp.down_proj", (64, 384), fmt)
    with pytest.raises(CheckpointError, match=r"384 columns in rotated int4 g64 cannot be") as e:
        collecting.check_cuts(target, [(0, 64)], (0, 192), 2)
    assert "multiples of 128; use a smaller tensor-parallel size or convert with a smaller " in str(
        e.value
    )
    qkv_target = Target("self_attn.k_proj", (256, 128), fmt)
    with pytest.raises(CheckpointError, match=r"256 rows in.*multiples of 128.*smaller block"):
        collecting.check_cuts(qkv_target, [(64, 128)], (0, 128), 4)


def test_rotated_parts_are_one_matrix_where_blocks_end_with_them() -> None:
    """Its input is turned once; where k's rows end inside a block each part turns it by itself."""
    fmt = Rotated(Integer(bits=4, group_size=32), block=128)
    x = torch.randn(3, 128)
    for sizes, count in (((256, 128, 64), 1), ((192, 64, 64), 3)):
        parts = [stored(fmt, rows, 128, rows) for rows in sizes]
        joined = runtime.join(parts)
        assert len(joined) == count
        prepared = runtime.prepare(joined, Want(kernel="cpu_exact"))
        assert prepared.kernel == ("rotated" if count == 1 else dispatch.SIDE_BY_SIDE)
        values = torch.cat([part.values() for part in parts])
        out = ops.product_of(prepared)(x, prepared.flat(), None)
        torch.testing.assert_close(out, x @ values.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("base", [Integer(bits=4, group_size=32), None])
@pytest.mark.parametrize("tokens", [1, 20])
def test_two_ranks_share_a_low_rank_matrix(base: Integer | None, tokens: int) -> None:
    """By rows each has its rows of A and all of B, by columns its columns of B and all of A."""
    fmt = LowRank(16, base)
    target, x = Target("mlp.up_proj", (96, 128), fmt), torch.randn(tokens, 128)
    tensors = packed(fmt, 96, 128)
    collecting.check(target, tensors)
    expected = x @ fmt.unpack(tensors).T

    def product(x: torch.Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
        collecting.check_cuts(target, [rows], cols, 2)
        pieces = runtime.join(collecting.cut(target, tensors, [rows], cols))
        prepared = runtime.prepare(pieces, Want(kernel="cpu_exact", dtype=torch.float32))
        sizes = [tuple(tensor.shape) for tensor in prepared.tensors]
        assert sizes == [(16, rows[1] - rows[0]), (16, cols[1] - cols[0])]
        return ops.product_of(prepared)(x, prepared.flat(), None)

    rows = [product(x, cut, (0, 128)) for cut in ((0, 48), (48, 96))]
    torch.testing.assert_close(torch.cat(rows, -1), expected, rtol=1e-4, atol=1e-3)
    cuts = ((0, 64), (64, 128))
    shares = [product(x[:, slice(*cut)].contiguous(), (0, 96), cut) for cut in cuts]
    torch.testing.assert_close(sum(shares), expected, rtol=1e-4, atol=1e-3)


def test_parts_with_factors_of_their_own_stay_apart() -> None:
    """q, k and v have three B; one that is stored fused has one."""
    fmt, x = LowRank(4, Integer(bits=4, group_size=32)), torch.randn(2, 128)
    parts = [stored(fmt, rows, 128, rows) for rows in (64, 32, 32)]
    joined = runtime.join(parts)
    assert len(joined) == 3
    prepared = runtime.prepare(joined, Want(kernel="cpu_exact"))
    assert prepared.kernel == dispatch.SIDE_BY_SIDE
    values = torch.cat([part.values() for part in parts])
    out = ops.product_of(prepared)(x, prepared.flat(), None)
    torch.testing.assert_close(out, x @ values.T, rtol=1e-4, atol=1e-3)
    whole = stored(fmt, 128, 128)
    pieces = [whole.cut(rows=rows) for rows in ((0, 32), (96, 128))]
    (again,) = runtime.join(pieces)
    expected = torch.cat([piece.values() for piece in pieces])
    torch.testing.assert_close(again.values(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("fmt", [*FORMATS, LowRank(4, FORMATS[0])], ids=lambda f: f.describe())
@pytest.mark.parametrize("rows", [8, 52])
def test_dummy_weights_are_matrices_of_zeros(fmt: Format, rows: int) -> None:
    target = Target("up", (rows, 128), fmt)
    tensors = collecting.zeros(target)
    collecting.check(target, tensors)
    assert torch.equal(fmt.unpack(tensors)[:rows], torch.zeros(rows, 128))


def test_a_missing_part_is_named() -> None:
    fmt = FORMATS[0]
    collector = collecting.Collector([Target(f"attn.{n}_proj", (64, 128), fmt) for n in "qkv"])
    collector.found = {"q": packed(fmt, 64, 128), "v": packed(fmt, 64, 128)}
    with pytest.raises(CheckpointError, match=r"attn\.k_proj\.weight_packed is missing"):
        collector.matrices(qkv(0, 1))
    with pytest.raises(CheckpointError, match=r"attn\.q_proj\.weight_scales is missing"):
        collecting.check(
            collector.targets[0], {"weight_packed": collector.found["q"]["weight_packed"]}
        )


def test_parts_that_cannot_be_joined_are_multiplied_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero points are stored by eight rows, so twelve rows cannot be followed by others."""
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "cpu_exact")
    fmt = Integer(bits=4, group_size=32, symmetric=False)
    parts = [stored(fmt, rows, 64, rows) for rows in (12, 20)]
    joined = runtime.join(parts)
    assert len(joined) == 2
    prepared = runtime.prepare(joined, Want(pad=4))
    assert [part.kernel for part in prepared.parts] == ["cpu_exact", "cpu_exact", "zeros"]
    x, bias = torch.randn(3, 64), torch.randn(32)
    out = torch.ops.vllm_compress.linear(x, prepared.flat(), bias, prepared.text())
    expected = x @ torch.cat([part.values() for part in parts]).T + bias
    assert torch.allclose(out[:, :32], expected, atol=1e-4)
    assert torch.equal(out[:, 32:], torch.zeros(3, 4))


def test_a_kernel_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "fastest")
    with pytest.raises(CheckpointError) as caught:
        runtime.prepare([stored(FORMATS[0], 64, 128)], Want())
    words = "VLLM_COMPRESS_KERNEL is 'fastest', expected vllm or one of cpu, cpu_exact, lowrank,"
    assert str(caught.value).startswith(words)
    assert "vllm_" not in str(caught.value)


def test_ops_are_sound_under_torch_compile() -> None:
    fmt = FORMATS[1]
    prepared = runtime.prepare([stored(fmt, 64, 128)], Want(embed=True))
    text, tensors = prepared.text(), prepared.flat()
    assert rebuild(text, tensors) == prepared
    for name, args in (
        ("linear", (torch.randn(2, 3, 128), tensors, torch.randn(64), text)),
        ("embedding", (torch.tensor([[1, 63]]), tensors, torch.bfloat16, text)),
    ):
        op = getattr(torch.ops.vllm_compress, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    turn = torch.ops.compress_methods.turn.default
    args = (torch.randn(3, 200).bfloat16(), torch.ones(128), True)
    torch.library.opcheck(turn, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "fmt",
    [Integer(4, 128), Integer(8, -1), Integer(4, 32, symmetric=False), Rotated(Integer(4, 128))],
)
def test_one_matrix_calls_the_operator_of_its_kernel(fmt: Format) -> None:
    """Which torch.compile sees, and which gives what the op that takes every format gives."""
    prepared = runtime.prepare([stored(fmt, 48, 384)], Want())
    tensors = prepared.flat()
    operator = dispatch.kernel(prepared.kernel).operator(prepared)
    assert operator is not None
    bias = torch.randn(48)
    for x in (torch.randn(2, 3, 384), torch.randn(5, 768)[:, ::2], torch.randn(5, 768)[:, :384]):
        expected = torch.ops.vllm_compress.linear(x, tensors, bias, prepared.text())
        assert torch.equal(ops.product_of(prepared)(x, tensors, bias), expected)
        args = (x, bias, *operator.settings, *tensors)
        torch.library.opcheck(
            operator.function, args, test_utils=("test_schema", "test_faketensor")
        )
    with pytest.raises(RuntimeError, match="the input has 64 columns, the matrix 3 lines of 128"):
        ops.product_of(prepared)(torch.randn(1, 64), tensors, None)


def test_the_cache_key_changes_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    before = envs.compile_factors()
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "reference")
    after = envs.compile_factors()
    assert {k for k in after if before.get(k) != after[k]} == {"VLLM_COMPRESS_FINGERPRINT"}

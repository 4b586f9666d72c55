"""Stored matrices as parameters: what is computed with is what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given

from compress_methods.checkpoint.compressed import Matrix
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.training.pieces import Adapted, Coded, Floats, Packed, Piece
from tests.unit.compress_methods.drawn import Drawn, integers, matrices, mid_integers, sparse

CPU = torch.device("cpu")
WIDE = (torch.float32, torch.bfloat16, torch.float16)


class Held:
    """A tensor in the place of an entry of a file."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read(self) -> torch.Tensor:
        return self.tensor.clone()


def stored(fmt: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return fmt.pack(fmt.nearest(weight))


def matrix_of(fmt: Format, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> Matrix:
    entries: Any = {name: Held(tensor) for name, tensor in tensors.items()}
    return Matrix("m", *shape, fmt, entries)


def leaves_of(piece: Piece, noise: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (leaf + noise * torch.randn(leaf.shape, generator=generator)).requires_grad_()
        for name, leaf in piece.leaves.items()
    }


def check_written_is_trained(piece: Piece, fmt: Format, noise: float) -> None:
    leaves = leaves_of(piece, noise)
    with torch.no_grad():
        piece.limit(leaves)
    value = piece.value(leaves)
    written = {name.removeprefix("m."): t for name, t in piece.stored(leaves).items()}
    specs = fmt.tensors(*value.shape)
    assert {n: (tuple(t.shape), str(t.dtype)) for n, t in written.items()} == {
        n: (s.shape, f"torch.{s.dtype}") for n, s in specs.items()
    }
    unpacked = fmt.unpack(written)
    size = unpacked.abs().amax().clamp(min=1e-30)
    torch.testing.assert_close(value / size, unpacked / size, rtol=0, atol=2e-6)


@given(matrices())
def test_what_is_written_is_what_was_trained_and_codes_stay(drawn: Drawn) -> None:
    fmt, weight = drawn
    weight = weight / weight.abs().amax().clamp(min=1e-30)
    tensors = stored(fmt, weight)
    piece = Packed(matrix_of(fmt, tensors, weight.shape), [], CPU)
    check_written_is_trained(piece, fmt, 0.05)
    written = piece.stored(piece.leaves)
    for name, tensor in tensors.items():
        if tensor.dtype not in WIDE:
            assert torch.equal(written[f"m.{name}"], tensor)
    assert torch.allclose(piece.value(piece.leaves), fmt.unpack(tensors), atol=1e-5)


@given(matrices())
def test_gradients_reach_every_float_that_is_stored(drawn: Drawn) -> None:
    fmt, weight = drawn
    weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    piece = Packed(matrix_of(fmt, stored(fmt, weight), weight.shape), [], CPU)
    leaves = leaves_of(piece, 0)
    wide = [name for name, t in piece.tensors.items() if t.dtype in WIDE]
    assert set(leaves) == set(wide)
    assume(wide)
    (piece.value(leaves) * torch.randn(weight.shape)).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.any(), name


CODED = matrices(mid_integers() | integers() | sparse(integers()))


@given(CODED)
def test_codes_that_moved_are_written_whole(drawn: Drawn) -> None:
    fmt, weight = drawn
    weight = weight / weight.abs().amax().clamp(min=1e-30)
    piece = Coded(matrix_of(fmt, stored(fmt, weight), weight.shape), [], CPU)
    check_written_is_trained(piece, fmt, 0.7)


@pytest.mark.parametrize("fmt", [Integer(2, 32, levels="mid"), Sparse(2, 4, Integer(4, 32))])
def test_training_of_codes_starts_from_the_codes_there_are(fmt: Format) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    tensors = stored(fmt, weight)
    piece = Coded(matrix_of(fmt, tensors, weight.shape), [], CPU)
    for name, tensor in piece.stored(piece.leaves).items():
        assert torch.equal(tensor, tensors[name.removeprefix("m.")]), name


def test_a_scale_has_the_gradient_of_lsq() -> None:
    """That of s * round(w / s) by s for a whole code: the code itself."""
    fmt = Integer(4, 32)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    tensors = stored(fmt, weight)
    piece = Packed(matrix_of(fmt, tensors, weight.shape), [], CPU)
    leaves = leaves_of(piece, 0)
    upstream = torch.randn(1, 32)
    (piece.value(leaves) * upstream).sum().backward()
    codes = fmt.solution(tensors).codes.float() - fmt.middle
    found = leaves["weight_scales"].grad
    assert found is not None
    torch.testing.assert_close(
        found / piece.units["weight_scales"], (codes * upstream).sum(1)[None]
    )


def test_kept_values_of_a_sparse_matrix_train_and_its_mask_stays() -> None:
    fmt = Sparse(1, 4, Dense("bfloat16"))
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    piece = Packed(matrix_of(fmt, stored(fmt, weight), weight.shape), [], CPU)
    moved = piece.value(leaves_of(piece, 0.5))
    assert torch.equal(moved != 0, fmt.unpack(stored(fmt, weight)) != 0)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_zeros_of_a_pruned_matrix_stay_and_few_zeros_are_values(rank: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    empty = torch.rand(weight.shape, generator=generator) < share
    empty[0, 0] = True
    entry: Any = Held(weight.masked_fill(empty, 0))
    entry.name, entry.dtype = "m", "bfloat16"
    piece = Floats(entry, "m", CPU) if not rank else Adapted(entry, "m", CPU, rank, generator)
    leaves = leaves_of(piece, 0.5)
    moved = piece.value(leaves)
    moved.square().sum().backward()
    assert piece.zeros == (int(empty.sum()) if share else 0)
    assert torch.equal(moved == 0, empty) == bool(share)
    assert torch.equal(piece.stored(leaves)["m"].float(), moved)
    if not rank:
        assert bool(leaves["values"].grad[0, 0]) != bool(share)  # type: ignore[index]

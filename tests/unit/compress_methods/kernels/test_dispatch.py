"""The one table: the highest rank is taken, what is made of several matrices, what travels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import FORMATS, Format, Stored, TensorSpec
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels import (
    KERNELS,
    Kernel,
    Prepared,
    Want,
    choose,
    embed,
    matmul,
    prepare,
    rebuild,
    side_by_side,
)
from compress_methods.kernels.base import cols_of, rows_of
from compress_methods.kernels.cpu import gemm
from compress_methods.kernels.dispatch import kernel_names

INT4, INT3, INT8 = Integer(4, 128), Integer(3, 128), Integer(8, -1)
INT8_BY_INT8 = Integer(8, -1, activations="int8")
CHOICES = (INT4, INT8, INT3, INT8_BY_INT8)


def stored(fmt: Format, rows: int = 64, cols: int = 256, seed: int = 0) -> Stored:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))


def chosen(fmt: Format, want: Want | None = None, rows: int = 64) -> str:
    return choose(stored(fmt, rows), want or Want()).name


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "library", lambda: None)


@pytest.mark.parametrize(
    ("compiled", "expected"),
    [
        (True, ["cpu", "cpu_exact", "cpu", "cpu"]),
        (False, ["torch_int4", "torch_int8", "reference", "torch_int8"]),
    ],
)
def test_cpu_table_prefers_our_kernels_then_torchs(
    compiled: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(gemm, "library", lambda: None)
    assert [chosen(fmt) for fmt in CHOICES] == expected


def test_plain_cpp_comes_after_torchs_kernels_and_before_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "library", lambda: SimpleNamespace(isa="plain"))
    assert [chosen(fmt) for fmt in CHOICES] == ["torch_int4", "torch_int8", "cpu", "torch_int8"]
    assert chosen(Sparse(64, 128, INT8)) == "cpu"
    assert chosen(Sparse(64, 128, Dense())) == "cpu_exact"
    assert chosen(INT4, Want(embed=True)) == "cpu"


@pytest.mark.parametrize(
    ("fmt", "name"), [(INT4, "reference"), (INT4, "torch_int4"), (INT4, "cpu_exact"), (INT8, "cpu")]
)
def test_a_named_kernel_is_taken_whatever_its_rank(fmt: Format, name: str) -> None:
    assert chosen(fmt) != name
    assert chosen(fmt, Want(kernel=name)) == name


@pytest.mark.parametrize(
    ("fmt", "want", "rows", "expected"),
    [
        (INT3, Want(kernel="torch_int4"), 64, "cpu"),
        (INT4, Want(kernel="torch_int8"), 64, "cpu"),
        (INT4, Want(kernel="torch_int4", embed=True), 64, "cpu"),
        (INT4, Want(kernel="torch_int4"), 40, "cpu"),
        (Dense(), Want(kernel="cpu_exact"), 64, "reference"),
    ],
)
def test_a_named_kernel_that_cannot_is_passed_over(
    fmt: Format, want: Want, rows: int, expected: str
) -> None:
    assert chosen(fmt, want, rows) == expected


@pytest.mark.usefixtures("without_compiler")
def test_torchs_int4_kernel_looks_no_rows_up() -> None:
    assert chosen(INT4, Want(embed=True)) == "reference"


def test_elsewhere_than_on_cpus_only_the_reference_is_able() -> None:
    for fmt in (*CHOICES, Sparse(2, 4, INT8), Dense()):
        assert choose(stored(fmt).to(torch.device("meta"))).name == "reference"


class Borrowed(Kernel):
    """Another distribution's: takes integers of 4 bits, does what the reference does."""

    name: ClassVar[str] = "test_borrowed"
    answers_to: ClassVar[tuple[str, ...]] = ("borrowed",)
    given: ClassVar[int | None] = 1000

    def rank(self, stored: Stored, want: Want) -> int | None:
        if not isinstance(stored.format, Integer) or stored.format.bits != 4:
            return None
        return 1 if self.wanted(want) else self.given

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        return Prepared(self.name, *stored.size, [stored.values()])

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, prepared.tensors[0], bias)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Kernel]], None]:
    """Puts a kernel in the table until the test ends."""
    return lambda cls: monkeypatch.setitem(KERNELS._classes, cls.name, cls)


def test_an_entry_that_outranks_ours_is_taken_for_what_it_is_able_to(
    enter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(Borrowed)
    assert [chosen(fmt) for fmt in CHOICES] == ["test_borrowed", "cpu_exact", "cpu", "cpu"]
    assert chosen(INT4, Want(kernel="cpu")) == "cpu"
    piece, x, bias = stored(INT4), torch.randn(3, 256), torch.randn(64)
    expected = x @ piece.values().T + bias
    torch.testing.assert_close(matmul(x, prepare(piece), bias), expected)
    monkeypatch.setattr(Borrowed, "given", 199)
    assert chosen(INT4) == "cpu"
    # By itself it asks for nothing, but it may be named, also by its other name.
    monkeypatch.setattr(Borrowed, "given", None)
    assert chosen(INT4) == "cpu"
    for name in ("test_borrowed", "borrowed"):
        assert chosen(INT4, Want(kernel=name)) == "test_borrowed"


def test_names_that_can_be_asked_for_are_those_of_kernels_and_their_others(enter: Any) -> None:
    ours = {"cpu", "cpu_exact", "torch_int4", "torch_int8", "reference"}
    assert ours <= set(kernel_names())
    assert not {"side_by_side", "zeros", "borrowed"} & set(kernel_names())
    enter(Borrowed)
    assert {"test_borrowed", "borrowed"} <= set(kernel_names())


def test_where_no_kernel_is_able_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(KERNELS):
        monkeypatch.setattr(KERNELS._classes[name], "rank", lambda *_: None)
    with pytest.raises(FormatError) as caught:
        prepare(stored(INT4).cut(rows=(0, 32)))
    assert str(caught.value) == "no kernel multiplies int4 g128 [32, 256] on cpu"


def mixed() -> tuple[list[Stored], Prepared]:
    """Three matrices side by side, each by a kernel of its own."""
    pieces = [stored(INT4, 64), stored(INT8, 20, seed=1), stored(Dense(), 7, seed=2)]
    return pieces, side_by_side([prepare(piece, Want(kernel="cpu_exact")) for piece in pieces])


def test_matrices_side_by_side_keep_their_kernels_and_their_outputs_follow_one_another() -> None:
    pieces, made = mixed()
    assert [part.kernel for part in made.parts] == ["cpu_exact", "cpu_exact", "reference"]
    assert (made.rows, made.cols) == (91, 256)
    values = torch.cat([piece.values() for piece in pieces])
    x, bias = torch.randn(2, 3, 256), torch.randn(91)
    for own in (None, bias):
        expected = x @ values.T + (0 if own is None else own)
        out = matmul(x, made, own)
        assert out.shape == (2, 3, 91)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert matmul(x.bfloat16(), made).dtype == torch.bfloat16


def test_one_matrix_side_by_side_is_itself() -> None:
    one = prepare(stored(INT4))
    assert side_by_side([one]) is one


@pytest.mark.parametrize("fmt", [INT4, Dense()])
def test_padding_adds_outputs_of_zero_and_rows_are_those_of_the_matrix(fmt: Format) -> None:
    piece, ids = stored(fmt, 20), torch.tensor([[0, 19], [3, 3]])
    prepared = prepare(piece, Want(embed=True, pad=12, kernel="cpu_exact"))
    assert (prepared.rows, prepared.cols) == (32, 256)
    x, bias = torch.randn(4, 256), torch.randn(32)
    out = matmul(x, prepared)
    torch.testing.assert_close(out[:, :20], x @ piece.values().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[:, 20:], torch.zeros(4, 12))
    assert torch.equal(matmul(x, prepared, bias)[:, 20:], bias[20:].expand(4, 12))
    found = embed(ids, prepared, torch.bfloat16)
    assert (found.shape, found.dtype) == ((2, 2, 256), torch.bfloat16)
    assert torch.equal(found, piece.values()[ids].bfloat16())


def test_a_kernel_that_pads_is_given_the_padding(enter: Any) -> None:
    class Padding(Borrowed):
        name: ClassVar[str] = "test_padding"
        pads: ClassVar[bool] = True

        def prepare(self, stored: Stored, want: Want) -> Prepared:
            values = torch.nn.functional.pad(stored.values(), (0, 0, 0, want.pad))
            return Prepared(self.name, len(values), values.shape[1], [values])

    enter(Padding)
    prepared = prepare(stored(INT4, 20), Want(pad=12))
    assert (prepared.kernel, prepared.rows, prepared.parts) == ("test_padding", 32, ())


@dataclass(frozen=True)
class Twice(Format):
    """Test format: another format's matrix times a number, as wrappers that add to a base are."""

    base: Format
    name: ClassVar[str] = "test-twice"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        return {**self.base.tensors(rows, cols), "weight_factor": TensorSpec((1,), "float32")}

    def pack(self, solution: Any) -> dict[str, Tensor]:
        return {**self.base.pack(solution), "weight_factor": torch.tensor([2.0])}

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.base.solution(tensors), tensors["weight_factor"]

    def matrix(self, solution: Any) -> Tensor:
        return self.base.matrix(solution[0]) * solution[1]

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        return self.base.nearest(weight / 2)


class Doubling(Kernel):
    """Has its base multiplied by the table's kernel for that."""

    name: ClassVar[str] = "test_doubling"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return 500 if isinstance(stored.format, Twice) else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        assert isinstance(stored.format, Twice)
        base = prepare(stored.nested(stored.format.base), want)
        tensors, facts = [stored.tensors["weight_factor"].clone()], {"why": ["twice", 2]}
        size = stored.size
        return Prepared(self.name, *size, tensors, stored.format, parts=(base,), facts=facts)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        out = matmul(x, prepared.parts[0]) * prepared.tensors[0]
        return out if bias is None else out + bias


@pytest.fixture
def wrapped(enter: Any, monkeypatch: pytest.MonkeyPatch) -> Stored:
    enter(Doubling)
    monkeypatch.setitem(FORMATS._classes, Twice.name, Twice)
    return stored(Twice(INT8), 48)


def test_a_wrappers_base_keeps_its_own_kernel(wrapped: Stored) -> None:
    for name, expected in ((None, "cpu_exact"), ("torch_int8", "torch_int8")):
        prepared = prepare(wrapped, Want(kernel=name))
        assert (prepared.kernel, prepared.parts[0].kernel) == ("test_doubling", expected)
    x = torch.randn(5, 256)
    expected = x @ wrapped.values().T
    torch.testing.assert_close(matmul(x, prepare(wrapped)), expected, rtol=1e-4, atol=1e-3)


def kinds(prepared: Prepared) -> Any:
    """All of a prepared matrix but its tensors."""
    facts = json.loads(json.dumps(dict(prepared.facts)))
    own = prepared.kernel, prepared.rows, prepared.cols, len(prepared.tensors), prepared.format
    return (*own, facts, [kinds(part) for part in prepared.parts])


def test_a_matrix_and_its_parts_are_rebuilt_from_text_and_tensors(wrapped: Stored) -> None:
    whole = side_by_side([prepare(wrapped), mixed()[1], Prepared("zeros", 5, 256)])
    text, tensors = whole.text(), whole.flat()
    assert len(tensors) == 1 + 2 + 2 + 2 + 1
    assert (rows_of(text), cols_of(text)) == (48 + 91 + 5, 256)
    again = rebuild(text, tensors)
    assert kinds(again) == kinds(whole)
    assert [t.data_ptr() for t in again.flat()] == [t.data_ptr() for t in tensors]
    assert again.text() == text
    x, bias = torch.randn(3, 256), torch.randn(144)
    assert torch.equal(matmul(x, again, bias), matmul(x, whole, bias))
    # The text alone says which tensor is whose: others in their place are multiplied.
    zeroed = rebuild(text, [torch.zeros_like(tensors[0]), *tensors[1:]])
    assert torch.equal(matmul(x, zeroed)[:, :48], torch.zeros(3, 48))
    assert torch.equal(matmul(x, zeroed)[:, 48:], matmul(x, whole)[:, 48:])


def test_runtime_tensors_are_the_kernels_own() -> None:
    """The stored ones may be views of a file that is closed."""
    for fmt in (*CHOICES, Sparse(64, 128, INT8), Dense()):
        for name in ("reference", None):
            piece = stored(fmt)
            prepared = prepare(piece, Want(kernel=name))
            x = torch.ones(2, 256)
            before = matmul(x, prepared)
            for tensor in piece.tensors.values():
                tensor.zero_()
            assert torch.equal(matmul(x, prepared), before)

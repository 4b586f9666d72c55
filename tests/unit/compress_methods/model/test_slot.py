"""A matrix is a view of its parameter, however it lies in there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_methods.model.slot import Index, Slot


class Model(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.experts = nn.Parameter(torch.arange(48.0).reshape(2, 6, 4))


CASES: list[tuple[Slot, torch.Tensor]] = [
    (Slot("plain", "plain", "blocks", 3, 4), torch.arange(12.0).reshape(3, 4)),
    (Slot("t", "plain", "blocks", 4, 3, transposed=True), torch.arange(12.0).reshape(3, 4).T),
    (
        Slot("e.1.up", "experts", "experts", 3, 4, index=(1, (3, 6))),
        torch.arange(36.0, 48.0).reshape(3, 4),
    ),
    (Slot("e.0", "experts", "experts", 6, 4, index=(0,)), torch.arange(24.0).reshape(6, 4)),
    (
        Slot("e.1.t", "experts", "experts", 2, 6, transposed=True, index=(1, (0, 6), (2, 4))),
        torch.arange(24.0, 48.0).reshape(6, 4)[:, 2:].T,
    ),
]


@pytest.mark.parametrize(("slot", "expected"), CASES, ids=lambda case: getattr(case, "module", ""))
def test_the_matrix_is_where_the_slot_says_and_is_written_back_there(
    slot: Slot, expected: torch.Tensor
) -> None:
    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert tuple(slot.view(model).shape) == (slot.rows, slot.cols)
    assert torch.equal(slot.view(model), expected)
    assert torch.equal(slot.of(before[slot.parameter]), expected)
    slot.write(model, -1 - expected.bfloat16())
    assert torch.equal(slot.view(model), -1 - expected)
    changed = {n: int((p != before[n]).sum()) for n, p in model.named_parameters()}
    assert changed.pop(slot.parameter) == slot.rows * slot.cols
    assert set(changed.values()) == {0}


@pytest.mark.parametrize(
    ("transposed", "index", "plain"),
    [(False, (), True), (True, (), False), (False, (0,), False), (False, ((0, 2),), False)],
)
def test_only_a_whole_parameter_row_by_row_is_plain(
    transposed: bool, index: Index, plain: bool
) -> None:
    assert Slot("m", "m", "", 2, 2, transposed, index).is_plain is plain


def test_a_slot_is_read_from_a_checkpoint_as_the_checkpoint_holds_it() -> None:
    class Source:
        def read_slot(self, slot: Slot) -> torch.Tensor:
            return torch.full((slot.rows, slot.cols), 7.0)

    slot = Slot("m", "m.weight", "blocks", 2, 3)
    assert torch.equal(slot.read(Source()), torch.full((2, 3), 7.0))

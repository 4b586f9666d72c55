"""Tables that keep to a width, with every cell in one of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.text_table import align, fold

CELL = st.text("abc1.", min_size=1, max_size=12)


@given(st.integers(3, 9).flatmap(lambda n: st.lists(st.tuples(*[CELL] * n), min_size=2)))
def test_folded_tables_have_every_cell_and_keep_to_the_width(rows: list[tuple[str, ...]]) -> None:
    lines = fold(rows, (0,), width=30)
    assert max(map(len, lines)) <= 30
    tables = "\n".join(lines).split("\n\n")
    found: list[list[str]] = [[row[0]] for row in rows]
    for table in tables:
        for cells, line in zip(found, table.split("\n"), strict=True):
            first, *others = line.split()
            assert first == cells[0]
            cells += others
    assert found == [list(row) for row in rows]


def test_what_fits_is_one_table_and_empty_columns_are_left_out() -> None:
    rows = [("name", "a", "b"), ("x", "1", "-"), ("y", "22", "")]
    assert fold(rows, (0,)) == align(rows, (0,)) == ["name   a", "x      1", "y     22"]


def test_a_column_wider_than_the_width_stands_alone() -> None:
    rows = [("name", "a", "b"), ("x", "1" * 40, "2")]
    assert [len(line.split()) for line in fold(rows, (0,), width=30) if line] == [2, 2, 2, 2]

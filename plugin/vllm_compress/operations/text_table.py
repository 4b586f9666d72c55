"""A table as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

EMPTY = ("", "-")
GAP = "  "
WIDTH = 100


def align(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The rows, a header first, with aligned columns: to the left those in `left`, all others to
    the right. Columns that are empty below the header are left out."""
    widths = _widths(rows)
    return _lines(rows, left, widths, list(widths))


def fold(rows: Sequence[Sequence[str]], left: Collection[int], width: int = WIDTH) -> list[str]:
    """As `align`, in as many tables below each other as it takes to keep to a width: those columns
    that are in `left` begin each of them."""
    widths = _widths(rows)
    named = [i for i in widths if i in left]
    tables: list[list[int]] = [[]]
    room = start = width - sum(widths[i] for i in named) - len(GAP) * (len(named) - 1)
    for i in widths:
        if i in left:
            continue
        room -= widths[i] + len(GAP)
        if room < 0 and tables[-1]:
            tables.append([])
            room = start - widths[i] - len(GAP)
        tables[-1].append(i)
    lines = []
    for columns in tables:
        lines += ["", *_lines(rows, left, widths, [*named, *columns])]
    return lines[1:]


def _widths(rows: Sequence[Sequence[str]]) -> dict[int, int]:
    """Widths of the columns that have something below the header."""
    kept = [i for i in range(len(rows[0])) if any(row[i] not in EMPTY for row in rows[1:])]
    return {i: max(len(row[i]) for row in rows) for i in kept}


def _lines(
    rows: Sequence[Sequence[str]],
    left: Collection[int],
    widths: Mapping[int, int],
    columns: Sequence[int],
) -> list[str]:
    return [
        GAP.join(
            row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in columns
        ).rstrip()
        for row in rows
    ]

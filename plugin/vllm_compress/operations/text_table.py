"""A table as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

EMPTY = ("", "-")


def align(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The rows, a header first, with aligned columns: to the left those in `left`, all others to
    the right. Columns that are empty below the header are left out."""
    kept = [i for i in range(len(rows[0])) if any(row[i] not in EMPTY for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    return [
        "  ".join(
            row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in kept
        ).rstrip()
        for row in rows
    ]

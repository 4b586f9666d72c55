"""Whether a compressed matrix can be cut for tensor parallelism, from its format's declaration.

vLLM cuts the columns (inputs) of the layers that end an attention or feed-forward block and the
rows (outputs) of all others; the vocabulary it pads first. Known by the names below, which are
those of the transformers model families vLLM serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compress_methods.errors import FormatError

if TYPE_CHECKING:
    from compress_methods.compressed import CompressedCheckpoint

ROW_PARALLEL = frozenset(
    ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "w2", "wo", "dense", "dense_4h_to_h")
)
VOCABULARY = ("embedding", "lm_head")


class Cuttable(Protocol):
    """What is asked of a format here: `Format`, or the planner's stand-in that needs no torch."""

    def units(self, rows: int, cols: int) -> tuple[int, int]: ...

    def describe(self) -> str: ...


def check_matrix(module: str, kind: str, shape: tuple[int, int], fmt: Cuttable, ways: int) -> None:
    """Raise `FormatError` unless [rows, cols] = `shape` can be split over `ways` ranks.

    `kind` is what `Skeleton.kind` says; a vocabulary is padded by vLLM, so its rows always fit.
    """
    if ways == 1 or kind in VOCABULARY:
        return
    row_unit, col_unit = fmt.units(*shape)
    cuts_columns = module.rpartition(".")[2] in ROW_PARALLEL
    size, unit, what = (
        (shape[1], col_unit, "columns") if cuts_columns else (shape[0], row_unit, "rows")
    )
    if size % ways or (size // ways) % unit:
        each = f"{size / ways:g}"
        raise FormatError(
            f"{module}: {size} {what} over tensor-parallel {ways} are {each} each, "
            f"no multiple of {unit} ({fmt.describe()}); choose a smaller group_size or m"
        )


def shares_heads(heads: int, groups: int, ways: int) -> bool:
    """Whether vLLM can run attention over so many ranks; KV heads are repeated where too few."""
    return heads % ways == 0 and (groups % ways == 0 if groups >= ways else ways % groups == 0)


def check_sharding(checkpoint: CompressedCheckpoint, ways: int) -> None:
    """`check_matrix` for every matrix of a compressed checkpoint."""
    for matrix in checkpoint.matrices.values():
        table = matrix.module == checkpoint.spec.embedding
        kind = VOCABULARY[0] if table or matrix.module.endswith("lm_head") else ""
        check_matrix(matrix.module, kind, (matrix.rows, matrix.cols), matrix.format, ways)

"""Whether a compressed matrix can be cut for tensor parallelism, from its format's declaration.

vLLM cuts the columns (inputs) of the layers that end an attention or feed-forward block and the
rows (outputs) of all others; the vocabulary it pads first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.errors import FormatError
from compress_methods.formats import Format
from compress_methods.model.architecture import GENERIC, Architecture, architecture_of

if TYPE_CHECKING:
    from compress_methods.checkpoint.compressed import CompressedCheckpoint

VOCABULARY = ("embedding", "lm_head")


def check_matrix(
    module: str,
    kind: str,
    shape: tuple[int, int],
    fmt: Format,
    ways: int,
    architecture: Architecture = GENERIC,
) -> None:
    """Raise `FormatError` unless [rows, cols] = `shape` can be split over `ways` ranks.

    `kind` is what `Skeleton.kind` says; a vocabulary is padded by vLLM, so its rows always fit.
    """
    if ways == 1 or kind in VOCABULARY:
        return
    row_unit, col_unit = fmt.alignment(*shape)
    cuts_columns = architecture.cuts_columns(module)
    size, unit, what = (
        (shape[1], col_unit, "columns") if cuts_columns else (shape[0], row_unit, "rows")
    )
    if size % ways or (size // ways) % unit:
        each = f"{size / ways:g}"
        raise FormatError(
            f"{module}: {size} {what} over tensor-parallel {ways} are {each} each, "
            f"no multiple of {unit} ({fmt.describe()}); choose a smaller {fmt.cut_by}"
        )


def shares_heads(heads: int, groups: int, ways: int) -> bool:
    """Whether vLLM can run attention over so many ranks; KV heads are repeated where too few."""
    return heads % ways == 0 and (groups % ways == 0 if groups >= ways else ways % groups == 0)


def check_sharding(checkpoint: CompressedCheckpoint, ways: int) -> None:
    """`check_matrix` for every matrix of a compressed checkpoint."""
    architecture = architecture_of(checkpoint.config)
    for matrix in checkpoint.matrices.values():
        table = matrix.module == checkpoint.spec.embedding
        kind = VOCABULARY[0] if table or matrix.module.endswith("lm_head") else ""
        shape = (matrix.rows, matrix.cols)
        check_matrix(matrix.module, kind, shape, matrix.format, ways, architecture)

"""`vllm-compress inspect DIR`: what each matrix is stored as and what that costs.

Reads headers and report.json only, so it takes as long for 70B parameters as for 7M (`--zeros`
reads every weight). A directory of another method, or of none, works too; where stored integers do
not say how many weights they hold, shapes and bits per weight are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.system.words import size_text
from vllm_compress.operations.text_table import align

if TYPE_CHECKING:
    from compress_methods.checkpoint.compressed import Matrix
    from compress_methods.checkpoint.safetensors import Entry

DESCRIPTION = "Show formats, bytes, bits per weight and errors of a model, compressed or not."
EPILOG = """\
Errors come from report.json: the weights' is ||W - Q||^2 / ||W||^2, the outputs' the same of the
layer's output on calibration text. Zeros are the share of a matrix that is zero, from report.json
or, with --zeros, counted. A line stands for all layers alike, and its errors and zeros are means.

examples:
  vllm-compress inspect out/sparse50-int8
  vllm-compress inspect ./pruned --zeros --modules
  vllm-compress inspect out/sparse50-int8 --heatmap errors.png

--json prints one object with the keys
  name, base_model, recipe      directory, original model and recipe (null where unknown)
  original_bytes                of the original's weights, from report.json, else null
  bytes                         of all tensors; compressed_bytes of compressed matrices,
                                dense_bytes of the others
  weights                       how many, biases and norms included (null where unknown)
  bits_per_weight               of all; compressed_bits_per_weight of compressed matrices
  modules                       by name: format, shape, weights, bytes, bits_per_weight, compressed,
                                weight_error, output_error, zeros
  shared                        by module that has the matrix of another one: its name
  refined                       by trained block: iterations, the best of them, and loss
                                ([iteration, share of codes that are whole,
                                relative error of its output], ...); else null
  kv_cache                      by attention layer that has scales for an FP8 cache: q, k and v;
                                else null
Numbers that do not apply are null.
"""
HEADER = (
    *("module", "count", "format", "shape", "bytes", "bits", "zeros"),
    *("weight error", "output error"),
)
LEFT = (HEADER.index("module"), HEADER.index("format"))


@dataclass(frozen=True)
class Row:
    """One module: its stored form and what was measured when it was made."""

    format: str
    shape: tuple[int, ...] | None
    weights: int | None
    bytes: int
    bits_per_weight: float | None
    compressed: bool
    weight_error: float | None = None
    output_error: float | None = None
    zeros: float | None = None


@dataclass(frozen=True)
class Inspection:
    """A directory's modules, and what config.json and report.json say of them all."""

    name: str
    base_model: str | None
    recipe: str | None
    original_bytes: int | None
    modules: dict[str, Row]
    refined: dict[str, Any] | None = None
    shared: dict[str, str] = field(default_factory=dict)
    kv_cache: dict[str, list[float]] | None = None

    def totals(self) -> dict[str, Any]:
        """The keys of --json that are sums over modules."""
        rows = self.modules.values()
        packed = [row for row in rows if row.compressed]
        size, packed_size = (sum(row.bytes for row in some) for some in (rows, packed))
        weights = _sum_known(row.weights for row in rows)
        return {
            "bytes": size,
            "compressed_bytes": packed_size,
            "dense_bytes": size - packed_size,
            "weights": weights,
            "bits_per_weight": _bits(size, weights),
            "compressed_bits_per_weight": _bits(
                packed_size, _sum_known(row.weights for row in packed)
            ),
        }

    def title(self) -> list[str]:
        """Say what it is and where it is from."""
        origins = (("from", self.base_model), ("by", self.recipe))
        return [self.name, *(f"{word} {name}" for word, name in origins if name)]

    def to_dict(self) -> dict[str, Any]:
        """The object of --json."""
        head = asdict(self)
        modules = head.pop("modules")
        return {**head, **self.totals(), "modules": modules}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("inspect", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="model directory")
    parser.add_argument("--modules", action="store_true", help="a line for every module")
    parser.add_argument("--zeros", action="store_true", help="count zeros: reads all weights")
    parser.add_argument(
        "--heatmap", metavar="FILE", help="write a PNG of the errors by layer and module"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = read(Path(args.model), count=args.zeros)
    if args.heatmap is not None:
        from compress_methods.evaluation.heatmap import draw_heatmap

        modules = {name: asdict(row) for name, row in found.modules.items() if row.compressed}
        draw_heatmap(Path(args.heatmap), modules, ", ".join(found.title()))
    print(json.dumps(found.to_dict(), indent=2) if args.json else render(found, args.modules))
    return 0


def read(directory: Path, *, count: bool = False) -> Inspection:
    """Look at a directory; `count` its zeros, which reads it all. Raises `CheckpointError`."""
    from compress_methods.checkpoint.compressed import open_compressed, read_entries, read_json
    from compress_methods.checkpoint.loading.model import is_compressed
    from compress_methods.errors import CheckpointError

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    report_path = directory / "report.json"
    report = read_json(report_path) if report_path.exists() else {}
    errors = report.get("modules") or {}
    modules: dict[str, Row] = {}
    shared: dict[str, str] = {}
    base_model, kv_cache = report.get("base_model"), None
    if is_compressed(directory):
        checkpoint = open_compressed(directory)
        base_model = checkpoint.spec.base_model or base_model
        shared, kv_cache = checkpoint.shared, _kv_cache(checkpoint.kv_scales)
        for name, matrix in checkpoint.matrices.items():
            weights = matrix.rows * matrix.cols
            modules[name] = Row(
                matrix.format.describe(),
                (matrix.rows, matrix.cols),
                weights,
                matrix.nbytes,
                _bits(matrix.nbytes, weights),
                compressed=True,
                weight_error=errors.get(name, {}).get("weight_error"),
                output_error=errors.get(name, {}).get("output_error"),
                zeros=_zeros(matrix) if count else errors.get(name, {}).get("zeros"),
            )
        modules |= _dense_rows(checkpoint.dense, modules, "", count=count)
    else:
        block = read_json(directory / "config.json").get("quantization_config") or {}
        method = str(block.get("quant_method", "unknown"))
        modules |= _dense_rows(read_entries(directory), {}, method, count=count)
    recipe = (report.get("recipe") or {}).get("name")
    name = directory.resolve().name
    before, refined = report.get("bytes_before"), report.get("refined")
    return Inspection(name, base_model, recipe, before, modules, refined, shared, kv_cache)


def _kv_cache(scales: Mapping[str, Entry]) -> dict[str, list[float]] | None:
    """Scales of an FP8 cache by attention layer: of queries, keys and values."""
    found: dict[str, list[float]] = defaultdict(list)
    for name in sorted(scales, key=lambda name: "qkv".index(name.rpartition(".")[2][0])):
        found[name.rpartition(".")[0]].append(float(scales[name].read()))
    return dict(found) or None


def _dense_rows(
    entries: Mapping[str, Entry], compressed: Mapping[str, Row], method: str, *, count: bool
) -> dict[str, Row]:
    """A row for each module of plain tensors; for a compressed matrix's bias, a row of its own."""
    owned: dict[str, list[Entry]] = defaultdict(list)
    for name, entry in entries.items():
        module = name.rpartition(".")[0]
        owned[name if module in compressed or not module else module].append(entry)
    rows = {}
    for name, tensors in owned.items():
        main = next((t for t in tensors if t.name == f"{name}.weight"), tensors[0])
        size = sum(t.nbytes for t in tensors)
        if any("float" not in t.dtype for t in tensors) and method:
            rows[name] = Row(method, None, None, size, None, compressed=True)
            continue
        weights = sum(math.prod(t.shape) for t in tensors)
        dtype = main.dtype
        zeros = None
        if count:
            found = sum(int((slab == 0).sum()) for _, slab in main.slabs())
            zeros = found / max(1, math.prod(main.shape))
        rows[name] = Row(
            *(dtype, main.shape, weights, size, _bits(size, weights)), compressed=False, zeros=zeros
        )
    return rows


def _zeros(matrix: Matrix) -> float:
    return float((matrix.unpack() == 0).double().mean())


def render(found: Inspection, every_module: bool) -> str:
    """The table for people."""
    totals = found.totals()
    lines = [", ".join(found.title()), ""]
    lines += align([HEADER, *_lines(found.modules, every_module)], LEFT)
    size = size_text(totals["bytes"])
    if found.original_bytes:
        share = totals["bytes"] / found.original_bytes
        size += f", {share:.1%} of the original's {size_text(found.original_bytes)}"
    lines += ["", f"total       {size}, {_bits_text(totals['bits_per_weight'])}"]
    if totals["compressed_bytes"]:
        bits = _bits_text(totals["compressed_bits_per_weight"])
        lines.append(f"compressed  {size_text(totals['compressed_bytes'])}, {bits}")
        lines.append(f"the rest    {size_text(totals['dense_bytes'])}")
    lines += _sharers(found.shared)
    if found.kv_cache:
        most = ", ".join(
            f"{what} up to {max(scales):.3g}"
            for what, scales in zip("qkv", zip(*found.kv_cache.values(), strict=True), strict=True)
        )
        lines.append(f"KV cache    fp8 scales of {len(found.kv_cache)} layers: {most}")
    if found.refined:
        from compress_methods.conversion.report import refined_text

        lines.append(f"refined     {refined_text(found.refined)}")
    return "\n".join(lines)


def _lines(modules: Mapping[str, Row], every_module: bool) -> list[tuple[str, ...]]:
    """Cells of one line per module, or per name pattern, format and shape."""
    groups: dict[tuple[str, str, Any], list[Row]] = defaultdict(list)
    for name, row in modules.items():
        pattern = name if every_module else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        groups[pattern, row.format, row.shape].append(row)
    # Compressed first, each in the order of the file's names.
    ordered = sorted(groups.items(), key=lambda item: not item[1][0].compressed)
    lines: list[tuple[str, ...]] = []
    for (pattern, fmt, shape), rows in ordered:
        size = sum(row.bytes for row in rows)
        bits = _bits(size, _sum_known(row.weights for row in rows))
        lines.append(
            (
                pattern,
                str(len(rows)),
                fmt,
                "" if shape is None else " x ".join(map(str, shape)),
                size_text(size),
                "" if bits is None else f"{bits:.2f}",
                _mean_text((row.zeros for row in rows), ".1%"),
                _mean_text(row.weight_error for row in rows),
                _mean_text(row.output_error for row in rows),
            )
        )
    return lines


def _sharers(shared: Mapping[str, str]) -> list[str]:
    """A line for every layer that has matrices of another one."""
    layers: dict[tuple[str, str], int] = defaultdict(int)
    for pair in shared.items():
        alias, owner = (re.sub(r"(?<=\.\d)(\d*)\..*", r"\1", name) for name in pair)
        layers[alias, owner] += 1
    matrices = {key: "1 matrix" if n == 1 else f"{n} matrices" for key, n in layers.items()}
    return [f"shared      {a} has {what} of {o}" for (a, o), what in matrices.items()]


def _mean_text(values: Iterable[float | None], style: str = ".2e") -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), style) if known else ""


def _sum_known(values: Iterable[int | None]) -> int | None:
    """The sum, or None where one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


def _bits(size: int, weights: int | None) -> float | None:
    return 8 * size / weights if weights else None


def _bits_text(bits: float | None) -> str:
    return "bits per weight unknown" if bits is None else f"{bits:.2f} bits per weight"

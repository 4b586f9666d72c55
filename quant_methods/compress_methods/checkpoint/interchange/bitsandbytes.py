"""bitsandbytes: 4 bits by a table (`nf4`, `fp4`), and LLM.int8.

Stored, for a [rows, cols] matrix of 4 bits, as transformers' `save_pretrained` has it:

  weight                    uint8 [rows*cols/2, 1]  flattened, the first code high
  weight.absmax             float32 [blocks], or uint8 codes where scales are quantized too
  weight.quant_map          float32 [16]            what codes stand for
  weight.nested_absmax      float32, weight.nested_quant_map float32 [256]   of those scales
  weight.quant_state.bitsandbytes__nf4              JSON in uint8: shape, block sizes, offset

value = table[code] * absmax, with absmax = nested_table[code] * nested_absmax + offset where nested
(Dettmers et al., 2023, arXiv:2305.14314), which is format `lookup` with tables `bnb_nf4`, `bnb_fp4`
and scales in float32, where blocks end with rows. Of 8 bits:

  weight  int8 [rows, cols];  SCB  float32 [rows], the largest of each row;  weight_format

value = code * (SCB / 127) (Dettmers et al., 2022, arXiv:2208.07339), which is format `integer`;
columns of outliers are a matter of run time and leave no trace in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.parts.groups import DENSE, SIZES, Groups
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.formats.lookup import OF_FLOATS, Lookup, LookupSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

STATE = "weight.quant_state.bitsandbytes__"
LARGEST, ABSMAX, MAP = "SCB", "weight.absmax", "weight.quant_map"
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
MOST = 127


@register_layout
@dataclass(frozen=True)
class BitsAndBytes(Layout):
    """`load_in_4bit` and `load_in_8bit`."""

    name: ClassVar[str] = "bitsandbytes"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        found = {}
        for name, entry in entries.items():
            module, state, _ = name.partition(f".{STATE}")
            if state:
                rows, cols = _state(entry)["shape"]
                found[module] = (rows, cols)
            elif name.endswith(f".{LARGEST}"):
                module = name.removesuffix(f".{LARGEST}")
                rows, cols = entries[f"{module}.weight"].shape
                found[module] = (rows, cols)
        return found

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        leaves = (LARGEST, "weight_format", ABSMAX, MAP, *NESTED)
        own = [name for leaf in leaves if (name := f"{module}.{leaf}") in entries]
        state = _state_entry(module, entries)
        return [f"{module}.weight", *own, *([] if state is None else [state.name])]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        entry = _state_entry(module, entries)
        if entry is None:
            return self._groups(module, entries).format()
        return self._table_format(module, entries, _state(entry))

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        codes = entries[f"{module}.weight"].read()
        entry = _state_entry(module, entries)
        if entry is None:
            groups = self._groups(module, entries)
            return groups.read((codes.short() + groups.middle).to(torch.uint8))
        state = _state(entry)
        rows, cols = state["shape"]
        flat = codes.view(torch.uint8).flatten()
        places = torch.stack((flat >> 4, flat & 15), -1).flatten()[: rows * cols].int()
        table = self.needed(module, MAP, entries).read().float()
        scales = self._scales(module, entries, state)
        fmt = self._table_format(module, entries, state)
        if fmt is not None:
            by_rows = scales.reshape(rows, -1)
            repeat = fmt.groups(cols) // by_rows.shape[1]
            codes = places.to(torch.uint8).reshape(rows, cols)
            return fmt, LookupSolution(codes, by_rows.repeat_interleave(repeat, 1), table[None])
        values = table.index_select(0, places)
        spread = scales.repeat_interleave(int(state["blocksize"]))[: rows * cols]
        return DENSE, values.mul_(spread).reshape(rows, cols)

    def _table_format(
        self, module: str, entries: Mapping[str, Entry], state: Mapping[str, Any]
    ) -> Lookup | None:
        """What holds a matrix of codes of 4 bits exactly, if its table is known and its blocks are
        those of rows."""
        (rows, cols), block = state["shape"], int(state["blocksize"])
        table = self.needed(module, MAP, entries).read().float()
        group = next((s for s in SIZES if block % s == 0), 0)
        for name in OF_FLOATS if group and cols % block == 0 else ():
            fmt = Lookup(4, group, name, scale_dtype="float32")
            if torch.equal(fmt.fixed_table(table)[0], table):
                fmt.check_shape(rows, cols)
                return fmt
        return None

    def _groups(self, module: str, entries: Mapping[str, Entry]) -> Groups:
        cols = entries[f"{module}.weight"].shape[1]
        scales = self.needed(module, LARGEST, entries).read().float() / MOST
        return Groups(8, cols, scales[:, None])

    def _scales(
        self, module: str, entries: Mapping[str, Entry], state: Mapping[str, Any]
    ) -> Tensor:
        """float32 of every block."""
        absmax = self.needed(module, ABSMAX, entries).read()
        if absmax.dtype != torch.uint8:
            return absmax.float()
        largest, table = (self.needed(module, leaf, entries).read().float() for leaf in NESTED)
        size = int(state["nested_blocksize"])
        spread = largest.repeat_interleave(size)[: len(absmax)]
        return table.index_select(0, absmax.int()) * spread + float(state["nested_offset"])


def _state_entry(module: str, entries: Mapping[str, Entry]) -> Entry | None:
    found = (entries.get(f"{module}.{STATE}{kind}") for kind in ("nf4", "fp4"))
    return next((entry for entry in found if entry is not None), None)


def _state(entry: Entry) -> dict[str, Any]:
    try:
        found = json.loads(bytes(entry.read().tolist()))
        rows, cols = found["shape"]
        assert rows > 0 < cols < int(found["blocksize"]) * 2**40
    except (ValueError, KeyError, TypeError, AssertionError, UnicodeDecodeError):
        raise CheckpointError(
            f"{entry.path}: {entry.name} is no JSON with shape and blocksize"
        ) from None
    return dict(found)

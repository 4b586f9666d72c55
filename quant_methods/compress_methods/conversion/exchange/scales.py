"""split_scales: what training has made of a compressed model, as a small set beside its base.

    vllm-compress recover out/int2 --teacher MODEL --train scales --data task.jsonl -o trained ...
    vllm-compress split-scales trained --base out/int2 -o task

`train: scales` moves scales, norms and biases; codes stay (PEQA: Kim et al., 2023,
arXiv:2305.14152). So several tasks share one set of codes, and each is a few percent of its bytes.
The directory holds

    scales.safetensors   the tensors that differ from the base's, by their names in it
    scales.json          base: the seal of the report of the base it belongs to; model: its name

vLLM puts them in place of the base's while it loads it (`vllm_compress.scales`).

Fails where: codes were trained too, which is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import open_compressed, read_entries, read_json
from compress_methods.checkpoint.integrity import SEAL, read_report
from compress_methods.checkpoint.safetensors import Entry, Writer, read_header, read_tensors
from compress_methods.errors import CheckpointError
from compress_methods.formats import TensorSpec, torch_dtype
from compress_methods.lazy import torch
from compress_methods.system.files import new_directory, write_text

VALUES, FACTS = "scales.safetensors", "scales.json"


def split_scales(directory: str | Path, base: str | Path, out: str | Path) -> dict[str, int]:
    """Write to `out` what of a trained `directory` differs from `base`; returns bytes by tensor.

    Raises `CheckpointError` where more than floats differ, or nothing; `OutputError` where `out`
    exists.
    """
    trained, origin, place = Path(directory), open_compressed(base).path, Path(out)
    seal = read_report(origin)[SEAL]
    changed = _changed(trained, origin)
    if not changed:
        raise CheckpointError(f"{trained}: nothing in it differs from {origin}")
    specs = {name: TensorSpec(entry.shape, entry.dtype) for name, entry in changed.items()}
    with new_directory(place) as unfinished:
        with Writer(unfinished / VALUES, specs) as writer:
            for name, entry in changed.items():
                writer.put(name, entry.read())
        facts = {"base": seal, "model": origin.name}
        write_text(unfinished / FACTS, json.dumps(facts, indent=2) + "\n")
    return {name: entry.nbytes for name, entry in changed.items()}


def read_scales(directory: str | Path, base: str | Path) -> dict[str, Any]:
    """The tensors of a set, by name; `CheckpointError` where they are not of that `base`."""
    path = Path(directory)
    if not (path / FACTS).is_file():
        raise CheckpointError(f"{path}: holds no {FACTS}; split-scales writes it")
    facts = read_json(path / FACTS)
    if facts.get("base") != read_report(Path(base))[SEAL]:
        raise CheckpointError(
            f"{path}: belongs to another {facts.get('model')} than {base}; split it from a model "
            "trained from there"
        )
    held, found = read_entries(Path(base)), read_header(path / VALUES)
    for name, entry in found.items():
        other = held.get(name)
        if other is None or (other.shape, other.dtype) != (entry.shape, entry.dtype):
            raise CheckpointError(f"{path / VALUES}: {name} does not fit {base}")
    return read_tensors(path / VALUES)


def _changed(trained: Path, base: Path) -> dict[str, Entry]:
    """Tensors of `trained` that are not as in `base`."""
    mine, theirs = read_entries(trained), read_entries(base)
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [(e.shape, e.dtype) if (e := held.get(name)) else None for held in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{trained}: {name} is {shapes[0]}, in {base} {shapes[1]}; expected the same"
            )
    found = {}
    for name, entry in mine.items():
        if torch.equal(entry.read(), theirs[name].read()):
            continue
        dtype = torch_dtype(entry.dtype)
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(
                f"{trained}: {name} differs from that of {base}, and holds codes; "
                "`train: scales` keeps them"
            )
        found[name] = entry
    return found

"""Whether the bytes of a result are those that were written.

`report.json` holds the SHA-256 of every other file of its directory under `files`, and its own,
without that key, under `sha256`. Files of the work in progress carry theirs as a last tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.errors import CheckpointError
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

REPORT = "report.json"
FILES, SEAL = "files", "sha256"
CHUNK = 2**22


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(
    report: Mapping[str, Any], directory: Path, known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The report with the checksums of all files in `directory`, and its own; `known` are those of
    files just read."""
    known = known or {}
    paths = (p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    names = sorted(path.as_posix() for path in paths if _is_result(path))
    files = {name: known.get(name) or sha256(directory / name) for name in names}
    sealed = {**report, FILES: files}
    return {**sealed, SEAL: _own_sum(sealed)}


def _is_result(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix != ".tmp" and path != Path(REPORT)


def _own_sum(report: Mapping[str, Any]) -> str:
    """Of the values, however they are laid out in the file."""
    values = json.loads(json.dumps({k: v for k, v in report.items() if k != SEAL}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a result; `CheckpointError` where it is damaged or has no checksums."""
    path = directory / REPORT
    report = read_json(path)
    if not isinstance(report.get(FILES), dict) or SEAL not in report:
        raise CheckpointError(
            f"{path}: has no checksums ({FILES}), as an older vllm-compress made it; convert again"
        )
    if report[SEAL] != _own_sum(report):
        raise CheckpointError(f"{path}: damaged, its own checksum does not fit")
    return report


def find_damaged(
    directory: Path,
    report: Mapping[str, Any] | None = None,
    told: Callable[[Path], None] = lambda _: None,
) -> list[str]:
    """Names of files that are gone or not as they were written; `told` of each file that was read.

    A damaged report is one itself; none of the others can be told then.
    """
    if report is None:
        try:
            report = read_report(directory)
        except CheckpointError:
            return [REPORT]
    found = []
    for name, digest in report[FILES].items():
        path = directory / name
        if not path.is_file() or sha256(path) != digest:
            found.append(name)
        else:
            told(path)
    return found


def require_intact(directory: Path, told: Callable[[Path], None] = lambda _: None) -> None:
    """Read every file of a result; `CheckpointError` names the first that is not as written."""
    damaged = find_damaged(directory, read_report(directory), told)
    if damaged:
        path = directory / damaged[0]
        what = "damaged, its SHA-256 is not that in" if path.exists() else "missing, it is named in"
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CheckpointError(
            f"{path}{more}: {what} {REPORT}; the same convert command makes it again"
        )


def write_checked(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write tensors with their checksum."""
    seal = torch.frombuffer(bytearray(digest(tensors)), dtype=torch.uint8)
    write_tensors(path, {**tensors, SEAL: seal})


def read_checked(path: Path) -> dict[str, Tensor] | None:
    """What `write_checked` wrote; None where it is gone or damaged."""
    if not path.exists():
        return None
    try:
        tensors = read_tensors(path)
        found = tensors.pop(SEAL)
    except (CheckpointError, KeyError):
        return None
    return tensors if bytes(found.tolist()) == digest(tensors) else None


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()

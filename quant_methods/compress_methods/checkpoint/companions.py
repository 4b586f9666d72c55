"""The files beside the weights that a checkpoint is not whole without: tokenizer, processor,
templates, licence, and the folders of sentence-transformers (`1_Pooling`, `2_Dense`), whose small
layers are weights of their own and are copied as they are.

Other folders (other runtimes' exports, an original's own format) are left behind.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from compress_methods.system.files import copy_file

SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
LEFT = {
    "config.json",
    "report.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
}
TEMPLATES, MODULES = "additional_chat_templates", "modules.json"
LAYERS = {".safetensors", ".bin"}
"""What holds the weights of sentence-transformers' own layers."""


def companion_files(directory: Path) -> list[Path]:
    """Everything to copy beside the weights, in order."""
    found = [path for path in _files(directory) if path.name not in LEFT and _is_copied(path)]
    for folder in (TEMPLATES, *_module_folders(directory)):
        files = _files(directory / folder)
        found += [path for path in files if _is_copied(path) or path.suffix in LAYERS]
    return sorted(set(found))


def companion_name(path: Path, directory: Path) -> str:
    """What reports call a file of a checkpoint."""
    return path.relative_to(directory).as_posix()


def copy_companions(directory: Path, out: Path) -> None:
    """Copy them all to the same places in another directory."""
    for path in companion_files(directory):
        target = out / companion_name(path, directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")]


def _is_copied(path: Path) -> bool:
    """By its suffix; Mistral numbers its tokenizers (`tokenizer.model.v3`)."""
    numbered = ".model" in path.suffixes
    return path.suffix in SUFFIXES or numbered or path.name.upper().startswith("LICENSE")


def _module_folders(directory: Path) -> list[str]:
    """Folders inside the checkpoint that `modules.json` names."""
    try:
        modules = json.loads((directory / MODULES).read_text(encoding="utf-8"))
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [p for p in paths if isinstance(p, str) and p and _is_inside(p)]


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not PurePosixPath(path).is_absolute() and ".." not in parts

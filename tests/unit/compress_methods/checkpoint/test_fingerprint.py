"""The fingerprint of a source sees every byte that a result depends on."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.companions import companion_files
from compress_methods.checkpoint.source import fingerprint, open_source
from compress_methods.errors import OutputError
from compress_methods.model.skeleton import build_skeleton

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 8, "group_size": 128}},
    "modules": [{"match": "re:.*o_proj", "format": "w"}],
}


@pytest.fixture
def model(novels_8m: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(novels_8m, tmp_path / "model"))


def taken(directory: Path) -> str:
    return fingerprint(open_source(directory, build_skeleton(directory), "model", False))


def change(path: Path, at: int) -> None:
    """Flip a bit; size and time of change stay as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_one_bit_anywhere_in_the_weights_is_another_source(model: Path) -> None:
    whole, (file,) = taken(model), model.glob("*.safetensors")
    size, places = file.stat().st_size, random.Random(0)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for _ in range(20):
        at = places.randrange(header, size)
        change(file, at)
        assert taken(model) != whole
        change(file, at)
        assert taken(model) == whole


def test_what_is_copied_beside_the_weights_counts(model: Path) -> None:
    whole = taken(model)
    names = [path.name for path in companion_files(model)]
    assert "tokenizer.json" in names
    for name in names:
        text = (model / name).read_bytes()
        (model / name).write_bytes(text + b"\n")
        assert taken(model) != whole, name
        (model / name).write_bytes(text)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert taken(model) != whole


def test_the_old_result_is_not_given_for_a_changed_layer(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, RECIPE, out, quiet=True)
    (file,) = model.glob("*.safetensors")
    for at in (file.stat().st_size // 3, file.stat().st_size // 3 + 200_001):
        change(file, at)
        with pytest.raises(OutputError, match="another model"):
            convert(model, RECIPE, out, quiet=True)
        change(file, at)
    convert(model, RECIPE, out, quiet=True)

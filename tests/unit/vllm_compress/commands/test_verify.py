"""`check --deep` and `serve --verify` read every byte; `check` knows what is missing without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress_methods import convert
from vllm_compress.cli import main
from vllm_compress.commands import serve

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
}


@pytest.fixture(scope="module")
def result(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result")
    convert(novels_8m, RECIPE, out, quiet=True)
    return out


@pytest.fixture
def damaged(result: Path, tmp_path: Path) -> Path:
    """A copy with one flipped bit, where no header is."""
    out = Path(shutil.copytree(result, tmp_path / "damaged"))
    path = sorted(out.glob("block-*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    return out


def test_check_deep_reads_every_file(
    result: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(result), "--deep", "--json"]) == 0
    assert '"files": ' in capsys.readouterr().out
    assert main(["check", str(damaged), "--deep", "--json"]) == 2
    error = capsys.readouterr().err
    assert "block-00001.safetensors: damaged, its SHA-256" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("place", ["before", "after", "file"])
def test_serve_verify_starts_nothing_on_damaged_files(
    place: str,
    result: Path,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    monkeypatch.setattr(serve, "_check_options", lambda *_: None)
    monkeypatch.setattr(serve, "run_vllm", lambda arguments: started.append(arguments) or 0)

    def command(model: Path) -> list[str]:
        file = tmp_path / "deployment.yaml"
        file.write_text(f"{{version: 1, name: x, model: {model}}}")
        return {
            "before": ["serve", "--verify", str(model), "--port", "1"],
            "after": ["serve", str(model), "--port", "1", "--verify"],
            "file": ["serve", "--config", str(file), "--port", "1", "--verify"],
        }[place]

    assert main(command(damaged)) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert started == []
    assert main(command(result)) == 0
    assert "--verify" not in started[0]


def test_serve_verify_refuses_what_has_no_checksums(
    novels_8m: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (str(novels_8m), "someone/model"):
        assert main(["serve", model, "--verify"]) == 2
        assert "no checksums" in capsys.readouterr().err

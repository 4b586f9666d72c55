"""What commands say when a name is nearly right, a key is missing, or a file is not there."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compress_methods import registry
from compress_methods.errors import CompressError, nearest
from compress_methods.formats import FORMATS, format_from_dict
from compress_methods.formats.integer import Integer
from compress_methods.system import http as requests
from vllm_compress.cli import main


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command fails with."""
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("vllm-compress: error: ")


@pytest.mark.parametrize("recipe", [[], ["--recipe", "int8"]])
def test_check_names_the_nearest_hardware(
    capsys: pytest.CaptureFixture[str], one_matrix: Path, novels_8m: Path, recipe: list[str]
) -> None:
    model = str(novels_8m if recipe else one_matrix)
    line = error(capsys, "check", model, *recipe, "--hardware", "h101")
    assert line == "--hardware: unknown 'h101'; did you mean 'h100'?"


def test_check_says_what_that_hardware_would_use(
    capsys: pytest.CaptureFixture[str], one_matrix: Path
) -> None:
    def said(*options: str) -> dict[str, Any]:
        assert main(["check", str(one_matrix), "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    gpu = said("--hardware", "h100-sxm")
    assert gpu["device"] == "cuda"
    assert gpu["kernels"] == {"int4 g32": "vllm_mixed_precision"}
    assert gpu["device_memory"] > 70e9
    here = said()
    assert here["device"] == "cpu"
    assert here["kernels"] == {"int4 g32": "cpu"}
    assert here["device_memory"] is None


def test_check_of_a_recipe_knows_the_memory_of_the_hardware(
    capsys: pytest.CaptureFixture[str], novels_8m: Path, tmp_path: Path
) -> None:
    options = ["--recipe", "int8", "-o", str(tmp_path), "--hardware", "h100-sxm", "--json"]
    assert main(["check", str(novels_8m), *options]) == 0
    assert json.loads(capsys.readouterr().out)["device_memory"] > 70e9


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("int4", "did you mean 'int4-gptq' or 'int4-rtn'?"),
        ("int8-dynamc", "did you mean 'int8-dynamic'?"),
        ("in", "did you mean 'int2-gptq' or 'int4-gptq' or 'int4-rtn'?"),
        ("xyz", "valid: int2-gptq, int4-gptq, int4-rtn, int8, int8-dynamic"),
        ("", "valid: int2-gptq, int4-gptq, int4-rtn, int8, int8-dynamic"),
    ],
)
def test_names_that_begin_alike_come_first(found: str, expected: str) -> None:
    names = ["int8", "int4-rtn", "int4-gptq", "int8-dynamic", "int2-gptq"]
    assert nearest(found, names) == expected


def test_the_recipe_int4_suggests_recipes_of_4_bits(
    capsys: pytest.CaptureFixture[str], novels_8m: Path
) -> None:
    line = error(capsys, "check", str(novels_8m), "--recipe", "int4")
    assert line.endswith("did you mean 'int4-awq' or 'int4-gptq' or 'int4-rotated'?")


@pytest.mark.parametrize("url", [[], ["--url", "http://127.0.0.1:9"]])
def test_eval_looks_at_text_and_device_before_models(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    novels_8m: Path,
    some_text: Path,
    url: list[str],
) -> None:
    """Nor does it ask a server first."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model or a tokenizer was loaded, or memory looked at")

    monkeypatch.setattr("compress_methods.evaluation.offline.load_tokenizer", loaded)
    monkeypatch.setattr("compress_methods.evaluation.offline.loading_dtype", loaded)
    monkeypatch.setattr("compress_methods.evaluation.served.served_model", loaded)
    models = ["eval", str(novels_8m), "--against", str(novels_8m), "--quiet", *url]
    assert error(capsys, *models, "--text", "gone.txt") == "gone.txt: no such file"
    assert "expected .txt, .jsonl, .parquet" in error(capsys, *models, "--text", "text.pdf")
    line = error(capsys, *models, "--text", str(some_text), "--device", "gpu")
    assert line == "--device is 'gpu', expected auto, cpu, cuda or cuda:N"


@pytest.fixture
def closed() -> Iterator[str]:
    """A server that asks for a key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401, "Unauthorized")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("key", "state"), [(None, "is not set"), ("x", "holds another key")])
def test_a_server_that_wants_a_key_is_answered_with_its_variable(
    closed: str, key: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(requests.KEY_VARIABLE, raising=False)
    if key:
        monkeypatch.setenv(requests.KEY_VARIABLE, key)
    with pytest.raises(CompressError) as caught:
        requests.request_json(closed, timeout=5, error_class=CompressError)
    assert str(caught.value) == (
        f"{closed}: HTTP 401: Unauthorized; VLLM_API_KEY, which is sent as the server's key, "
        + state
    )


def test_a_third_partys_integer_does_not_replace_ours() -> None:
    @dataclass(frozen=True)
    class Other(Integer):
        name: ClassVar[str] = "integer"

    Other.__module__ = "third.party"
    with pytest.raises(CompressError) as caught:
        FORMATS.register(Other)
    assert str(caught.value) == (
        f"format 'integer' of third.party.{Other.__qualname__} has the name of "
        "compress_methods.formats.integer.Integer; rename it"
    )
    assert type(format_from_dict({"format": "integer", "bits": 4})) is Integer


def test_the_same_class_may_be_registered_again() -> None:
    names: registry.Registry[type] = registry.Registry("thing", "none")
    first, second = (type("Thing", (), {"name": "thing"}) for _ in range(2))
    names.register(first)
    names.register(second)
    assert names.get("thing", "here", CompressError) is second

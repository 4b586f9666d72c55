"""`convert` and `check` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.rotated import Rotated
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import MIXTURES
from vllm_compress.cli import main
from vllm_compress.commands.check import _kernel

RECIPE = """
formats: {w: {format: integer, bits: 4, group_size: 128}}
modules: [{match: blocks, format: w, algorithm: rtn}]
calibration: {held_out: 2, length: 64}
"""
REPORT_KEYS = {
    "fingerprint",
    "base_model",
    "recipe",
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "compressed_bits_per_weight",
    "parameters",
    "modules",
    "kept",
    "dropped",
    "unfit",
    "regrouped",
    "notes",
    "dense",
    "calibration",
    "held_out",
    "held_out_halves",
    "run",
    "files",
    "sha256",
}


@pytest.fixture(scope="module")
def compressed(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "mine.yaml").write_text(RECIPE)
    arguments = [str(novels_8m), "-o", str(folder / "out"), "--recipe", str(folder / "mine.yaml")]
    assert main(["convert", *arguments, "--calibration", str(some_text), "--quiet"]) == 0
    return folder / "out"


def test_convert_json_is_the_report(
    compressed: Path, novels_8m: Path, some_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = compressed.parent / "mine.yaml"
    again = ["convert", str(novels_8m), "-o", str(compressed), "--recipe", str(recipe)]
    assert main([*again, "--calibration", str(some_text), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((compressed / "report.json").read_text())
    assert set(printed) == REPORT_KEYS
    assert printed["run"]["peak_memory_bytes"] > 0


def test_a_draft_is_made_beside_the_model(
    novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recipes = ["--recipe", "int8", "--draft", "int4-rtn"]
    assert main(["convert", str(novels_8m), "-o", str(out), *recipes, "--quiet"]) == 0
    assert f"serve {out} --draft {out}-draft\n" in capsys.readouterr().out
    bits = [
        json.loads((directory / "report.json").read_text())["bits_per_weight"]
        for directory in (out, tmp_path / "out-draft")
    ]
    assert bits[1] < bits[0]
    asked = ["check", str(out), "--draft", f"{out}-draft", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes_with_draft"] == 2 * found["kv_bytes_per_token"]
    assert 0 < found["draft_bytes"] < found["bytes"]
    assert "writes 3 tokens ahead" in found["draft"]
    assert main([*asked[:3], "nowhere"]) == 2
    assert "--draft: nowhere is no directory" in capsys.readouterr().err


def test_check_before_converting_predicts_the_bytes(
    compressed: Path, novels_8m: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = compressed.parent / "mine.yaml"
    out = ["-o", str(tmp_path / "out")]
    assert main(["check", str(novels_8m), "--recipe", str(recipe), *out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["bytes_after"] == json.loads((compressed / "report.json").read_text())["bytes_after"]
    )
    assert found["seconds"] > 0
    assert found["memory"] < found["memory_free"]
    assert found["calibration"] is None
    assert not (tmp_path / "out").exists()


def test_check_says_how_much_of_what_text_is_used(
    novels_8m: Path, some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("rtn", "gptq"))
    asked = ["check", str(novels_8m), "--recipe", str(recipe), "-o", str(tmp_path / "out")]
    assert main([*asked, "--calibration", "self:code"]) == 0
    line = "96 + 2 held-out sequences of 64 tokens, sampled from the model itself, preset code"
    assert line in capsys.readouterr().out
    again = ["--calibration", str(some_text)]
    assert main([*asked, *again, *again]) == 2
    assert "license.txt: holds no text that another file" in capsys.readouterr().err


def test_check_before_serving_names_formats_and_kernels(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ["--tensor-parallel-size", "2", "--hardware", "h100-sxm"]
    assert main(["check", str(compressed), *ways, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == {"int4 g128": "vllm_mixed_precision"}
    assert found["bytes_per_device"] < found["bytes"] < found["device_memory"]
    assert main(["check", str(compressed)]) == 0
    assert "nothing wrong found" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "recipe"), [("mixtral", "nf4"), ("gpt_oss", "int8")])
def test_experts_that_would_not_be_served_are_told_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, recipe: str
) -> None:
    """No kernel of vLLM's reads nf4, and none of its methods is handed biases."""
    kind, config = MIXTURES[name]
    model, out = make_model(kind, tmp_path / "model", **config), str(tmp_path / "out")
    assert main(["check", str(model), "--recipe", recipe, "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == "on CPUs only"
    assert main(["convert", str(model), "--recipe", recipe, "-o", out, "--quiet"]) == 0
    assert main(["check", out, "--hardware", "h100-sxm"]) == 2
    assert "experts.0." in capsys.readouterr().err
    assert main(["check", out, "--hardware", "local"]) == 0


def test_experts_that_vllm_multiplies_on_gpus_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, config = MIXTURES["mixtral"]
    model, out = make_model(kind, tmp_path / "model", **config), str(tmp_path / "out")
    assert main(["check", str(model), "--recipe", "int8", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == "by vLLM's kernels on GPUs"
    assert main(["convert", str(model), "--recipe", "int8", "-o", out, "--quiet"]) == 0
    assert main(["check", out, "--hardware", "h100-sxm"]) == 0


def test_of_a_wrapper_the_kernel_of_the_format_inside_is_named_too() -> None:
    fmt = Rotated(Integer(4, 128))
    assert _kernel(fmt, (256, 512), "cuda") == "rotated (vllm_mixed_precision)"
    assert _kernel(Rotated(Integer(2, levels="mid")), (256, 512), "cuda") == "rotated (triton)"
    assert _kernel(fmt, (256, 512), "cpu") == f"rotated ({_kernel(fmt.base, (256, 512), 'cpu')})"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "MODEL", "--tensor-parallel-size", "4"], ["o_proj", "tensor-parallel 4"]),
        (["check", "MODEL", "--hardware", "h10"], ["'h10'", "'h100'"]),
        (["check", "PLAIN"], ["not compressed", "--recipe"]),
        (["check", "PLAIN", "--recipe", "int4-gtpq"], ["did you mean 'int4-gptq'?"]),
        (["check", "nowhere"], ["nowhere: no such directory"]),
        (["convert", "nowhere", "-o", "x", "--recipe", "int8"], ["nowhere: no such directory"]),
        (["convert", "PLAIN", "-o", "x"], ["--recipe"]),
        (["convert", "PLAIN", "--recipe", "int8", "--tensor-parallel-size", "0"], ["'0'"]),
        (["serve", "MODEL", "--tensor-parallel-size", "4"], ["o_proj", "tensor-parallel 4"]),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    compressed: Path,
    novels_8m: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(compressed), "PLAIN": str(novels_8m)}
    try:
        code = main([places.get(a, a) for a in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("vllm-compress: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error

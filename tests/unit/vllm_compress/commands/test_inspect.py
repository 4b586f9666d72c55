"""`inspect` shows what a directory holds: every byte once, and errors where they are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.quantization_config import CompressionSpec, Rule
from compress_methods.checkpoint.safetensors import read_header, write_tensors
from compress_methods.errors import CheckpointError
from compress_methods.evaluation import heatmap
from compress_methods.formats import format_from_dict
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from vllm_compress import cli
from vllm_compress.commands.results import inspect

LAYERS = 3


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """Projections in int4 with a bias each, a norm and an embedding as they were."""
    fmt = format_from_dict({"format": "integer", "bits": 4, "group_size": 32})
    tensors = {"model.embed.weight": torch.ones(100, 64), "model.norm.weight": torch.ones(64)}
    errors = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.proj"
        packed = fmt.pack(fmt.nearest(torch.randn(48, 64)))
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        tensors[f"{name}.bias"] = torch.zeros(48)
        errors[name] = {"weight_error": 0.01 * (layer + 1), "output_error": None}
    out = tmp_path / "small-int4"
    out.mkdir()
    write_tensors(out / "model.safetensors", tensors)
    spec = CompressionSpec(
        {"w4": fmt}, [Rule(r"re:model\.layers\.\d+\.proj", "w4", (48, 64))], base_model="small"
    )
    (out / "config.json").write_text(json.dumps({"quantization_config": spec.to_dict()}))
    report = {"bytes_before": 70_000, "modules": errors, "recipe": {"name": "int4-rtn"}}
    (out / "report.json").write_text(json.dumps(report))
    return out


def as_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["inspect", str(directory), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_byte_and_weight_is_counted_once(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(compressed, capsys)
    stored = sum(entry.nbytes for entry in read_header(compressed / "model.safetensors").values())
    assert found["bytes"] == stored == sum(m["bytes"] for m in found["modules"].values())
    assert found["bytes"] == found["compressed_bytes"] + found["dense_bytes"]
    assert found["weights"] == LAYERS * (48 * 64 + 48) + 100 * 64 + 64
    assert found["bits_per_weight"] == pytest.approx(8 * stored / found["weights"])
    assert found["compressed_bits_per_weight"] == pytest.approx(4 + 16 / 32)
    assert found["original_bytes"] == 70_000
    assert (found["name"], found["base_model"], found["recipe"]) == (
        "small-int4",
        "small",
        "int4-rtn",
    )


def test_a_module_has_its_format_shape_and_errors(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = as_json(compressed, capsys)["modules"]
    assert modules["model.layers.1.proj"] == {
        "format": "int4 g32",
        "shape": [48, 64],
        "weights": 48 * 64,
        "bytes": 48 * 64 * 9 // 16,
        "bits_per_weight": 4.5,
        "compressed": True,
        "weight_error": 0.02,
        "output_error": None,
        "zeros": None,
    }
    assert modules["model.layers.1.proj.bias"]["shape"] == [48]
    assert modules["model.embed"]["format"] == "float32"


def test_layers_alike_are_one_line(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(compressed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small-int4, from small, by int4-rtn"
    expected = "model.layers.*.proj 3 int4 g32 48 x 64 5.1 KiB 4.50 2.00e-02"
    assert lines[3].split() == expected.split()
    assert not [line for line in lines if "output error" in line]
    assert cli.main(["inspect", str(compressed), "--modules"]) == 0
    text = capsys.readouterr().out
    assert all(f"model.layers.{layer}.proj " in text for layer in range(LAYERS))


def test_tables_are_among_the_bytes_of_their_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fmt = format_from_dict({"format": "lookup", "bits": 3, "group_size": 32})
    tensors = fmt.pack(fmt.nearest(torch.randn(40, 64)))
    write_tensors(tmp_path / "model.safetensors", {f"a.{k}": v for k, v in tensors.items()})
    spec = CompressionSpec({"t": fmt}, [Rule("a", "t", (40, 64))], base_model="small")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": spec.to_dict()}))
    (found,) = as_json(tmp_path, capsys)["modules"].values()
    assert found["format"] == "lookup3 g32, table per 16 rows"
    assert found["bytes"] == 40 * 64 * 3 // 8 + 2 * 40 * 2 + 3 * 8


def test_a_plain_model_is_all_dense(novels_8m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(novels_8m, capsys)
    assert found["bytes"] == sum(e.nbytes for e in read_entries(novels_8m).values())
    assert found["bits_per_weight"] == 16
    assert found["compressed_bytes"] == 0
    assert found["compressed_bits_per_weight"] is None
    assert {m["format"] for m in found["modules"].values()} == {"bfloat16"}
    assert cli.main(["inspect", str(novels_8m)]) == 0
    assert "compressed  " not in capsys.readouterr().out


def test_integers_of_another_method_are_not_guessed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        "a.0.qweight": torch.zeros(8, 64, dtype=torch.int32),
        "a.0.scales": torch.zeros(1, 64, dtype=torch.float16),
        "norm.weight": torch.zeros(64, dtype=torch.float16),
    }
    write_tensors(tmp_path / "model.safetensors", tensors)
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = as_json(tmp_path, capsys)
    assert found["bits_per_weight"] is None
    assert found["modules"]["a.0"]["format"] == "gptq"
    assert found["modules"]["a.0"]["shape"] is None
    assert found["modules"]["norm"]["bits_per_weight"] == 16
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "bits per weight unknown" in capsys.readouterr().out


def test_help_documents_every_key(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect.read(compressed).to_dict()
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    text = capsys.readouterr().out
    row = next(iter(found["modules"].values()))
    assert not [key for key in [*found, *row] if key not in text]


def test_eval_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from compress_methods.evaluation.metrics import Sums

    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = capsys.readouterr().out
    assert not [key for key in Sums(tokens=1).result().to_dict() if key not in text]


def test_eval_prints_the_numbers_it_returns(
    novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("She was not there, and he said nothing more. " * 5)
    command = ["eval", str(novels_8m), "--against", str(novels_8m), "--text", str(text), "--quiet"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == 0
    assert cli.main(command) == 0
    out = capsys.readouterr()
    assert f"{found['perplexity']:.3f} (+0.00%" in out.out
    assert out.err == ""
    assert cli.main([*command, "--tokens", "1"]) == 2
    assert "--tokens is 1, expected a number from 2" in capsys.readouterr().err


def test_zeros_are_those_of_the_report_or_counted(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fmt = Sparse(16, 32, Integer(8, -1))
    weight = torch.randn(48, 64)
    weight[3] = 0
    tensors = {f"up.{key}": value for key, value in fmt.pack(fmt.nearest(weight)).items()}
    tensors["norm.weight"] = torch.tensor([0.0, 1, 2, 3])
    write_tensors(compressed / "model.safetensors", tensors)
    spec = CompressionSpec({"s": fmt}, [Rule("up", "s", (48, 64))])
    (compressed / "config.json").write_text(json.dumps({"quantization_config": spec.to_dict()}))
    (compressed / "report.json").write_text(json.dumps({"modules": {"up": {"zeros": 0.25}}}))
    assert inspect.read(compressed).modules["up"].zeros == 0.25
    counted = inspect.read(compressed, count=True).modules
    values = fmt.unpack(fmt.pack(fmt.nearest(weight)))
    assert counted["up"].zeros == float((values == 0).double().mean())
    assert counted["up"].zeros > 0.5
    assert counted["norm"].zeros == 0.25
    assert cli.main(["inspect", str(compressed), "--zeros"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "zeros" in out[2]
    assert out[3].split()[-1] == f"{counted['up'].zeros:.1%}"


def test_a_picture_shows_every_layer_and_kind(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "errors.png"
    command = ["inspect", str(compressed), "--heatmap", str(picture)]
    assert cli.main(command) == 0
    first = picture.read_bytes()
    image = imread(picture)[..., :3]
    assert image.reshape(-1, 3).std(0).min() > 0.05
    assert cli.main(command) == 0
    assert picture.read_bytes() == first
    assert [p.name for p in tmp_path.glob("*.tmp")] == []
    (compressed / "report.json").unlink()
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "no errors of layers to draw" in capsys.readouterr().err
    assert cli.main(["inspect", str(compressed), "--heatmap", str(tmp_path / "no" / "x.png")]) == 2


@pytest.mark.parametrize("measure", ["output_error", "weight_error"])
def test_cells_of_a_picture_are_the_errors_of_a_report(measure: str) -> None:
    names = [f"model.layers.{i}.{kind}" for i in (0, 2) for kind in ("attn.q", "mlp.up")]
    modules = {
        name: {"weight_error": 1.0 + i, "output_error": 10.0 + i} for i, name in enumerate(names)
    }
    if measure == "weight_error":
        modules[names[1]]["output_error"] = None
    modules["lm_head"] = {"weight_error": 5.0, "output_error": None}
    for expert in range(2):
        modules[f"model.layers.2.mlp.experts.{expert}.up"] = {
            "weight_error": 2.0 * expert,
            "output_error": 2.0 * expert,
        }
    found, cells = heatmap.find_errors(modules)
    first = 10.0 if measure == "output_error" else 1.0
    assert found == measure
    assert cells == {
        (0, "attn.q"): first,
        (0, "mlp.up"): first + 1,
        (2, "attn.q"): first + 2,
        (2, "mlp.up"): first + 3,
        (2, "mlp.experts.up"): 1.0,
    }


def test_what_is_no_model_is_one_line(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"vllm-compress: error: {tmp_path / 'none'}: no such directory\n"
    )
    (compressed / ".incomplete").touch()
    with pytest.raises(CheckpointError, match="conversion is not finished"):
        inspect.read(compressed)


def test_says_which_layers_share(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((compressed / "config.json").read_text())
    pair = {"model.layers.13.proj": "model.layers.1.proj"}
    config["quantization_config"]["tied"] = pair
    (compressed / "config.json").write_text(json.dumps(config))
    assert as_json(compressed, capsys)["shared"] == pair
    assert cli.main(["inspect", str(compressed)]) == 0
    said = capsys.readouterr().out
    assert "shared      model.layers.13 has 1 matrix of model.layers.1\n" in said

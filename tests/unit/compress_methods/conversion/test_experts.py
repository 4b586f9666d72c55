"""Mixtures of experts: every family's experts are packed one by one, whatever their checkpoint
holds, with text and without; what comes out are the values that are stored."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from compress_methods import convert
from compress_methods.algorithms import Hessian, InputNorms, Statistic
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.checkpoint.source import open_source
from compress_methods.conversion.job import open_job
from compress_methods.conversion.part import BlockPart
from compress_methods.conversion.passes import experts as expert_passes
from compress_methods.conversion.passes.comparing import _beside
from compress_methods.conversion.resources import estimate
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.model.experts import run_one_by_one
from compress_methods.model.skeleton import build_skeleton
from compress_methods.model.slot import Slot
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import MIXTURES

INT8 = {"format": "integer", "bits": 8, "group_size": 32}
INT3 = {"format": "integer", "bits": 3, "group_size": 32}


def recipe(algorithm: str = "rtn", fmt: dict[str, Any] = INT8, **calibration: Any) -> dict:
    return {
        "formats": {"w": fmt},
        "modules": [{"match": "experts", "format": "w", "algorithm": algorithm}],
        "calibration": {"samples": 4, "length": 32, "held_out": 0, **calibration},
    }


def mixture(name: str, folder: Path, **changes: Any) -> Path:
    kind, config = MIXTURES[name]
    return make_model(kind, folder, **{**config, **changes})


def experts_of(model: Path) -> dict[str, Slot]:
    return {n: s for n, s in build_skeleton(model).slots.items() if s.kind == "experts"}


@pytest.fixture(scope="module")
def mixtral(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads the tokens of novels-8m; of the first layer's experts the last never gets one."""
    changes = {"vocab_size": 4096, "num_experts_per_tok": 1}
    folder = mixture("mixtral", tmp_path_factory.mktemp("mixtral") / "m", **changes)
    for path in novels_8m.glob("tokenizer*"):
        shutil.copy(path, folder)
    tensors = read_tensors(folder / "model.safetensors")
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()
    router[0, 0], router[1, 0], router[2, 1] = 9, -9, 9  # one of the first two is above 0
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_packed_one_by_one_and_unpack_to_what_is_stored(
    tmp_path: Path, name: str
) -> None:
    model = mixture(name, tmp_path / "m")
    slots = experts_of(model)
    job, out = open_job(model, recipe()), tmp_path / "out"
    convert(model, recipe(), out, quiet=True)
    written = open_compressed(out)
    assert set(written.matrices) == set(slots)
    assert len(slots) % 12 == 0  # gate, up and down of four experts
    entries = read_entries(out)
    assert sum(e.nbytes for e in entries.values()) == job.plan.compressed_bytes
    assert not any(
        e.name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for e in entries.values()
    )
    loaded, original = load_model(out), load_model(model)
    for module, slot in slots.items():
        values = slot.view(loaded)
        assert torch.equal(values, written.matrices[module].unpack()), module
        off = (values - slot.view(original)).abs().max()
        assert 0 < off < 0.01, module
    packed = {slot.parameter for slot in slots.values()}
    for parameter, tensor in original.named_parameters():
        if parameter not in packed:
            assert torch.equal(tensor, loaded.get_parameter(parameter)), parameter


@pytest.mark.parametrize("name", MIXTURES)
def test_a_source_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    import transformers

    model = mixture(name, tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    skeleton = build_skeleton(model)
    source = open_source(model, skeleton, name, False)
    for parameter, tensor in reference.state_dict().items():
        if parameter in skeleton.parameter_names():
            assert torch.equal(source.read(parameter), tensor), parameter
    for slot in skeleton.slots.values():
        assert torch.equal(slot.read(source), slot.view(reference)), slot.module


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4", "gpt_oss"])
def test_experts_are_calibrated_on_what_they_get(
    tmp_path: Path, name: str, novels_8m: Path, some_text: Path
) -> None:
    """With text the outputs of a mixture come closer to the original's than rounding brings them,
    which they would not if an expert were given another one's inputs."""
    model = mixture(name, tmp_path / "m", vocab_size=4096)
    for path in novels_8m.glob("tokenizer*"):
        shutil.copy(path, model)
    lost = {}
    for algorithm in ("rtn", "gptq"):
        asked = recipe(algorithm, INT3, samples=16, length=128, held_out=4)
        out = tmp_path / algorithm
        report = convert(model, asked, out, calibration=some_text, quiet=True)
        lost[algorithm] = report["held_out"]["kl"]
    assert lost["gptq"] < 0.8 * lost["rtn"]


def test_of_a_trained_mixture_gptq_loses_less_than_rounding(
    trained_mixture: Path, some_text: Path, tmp_path: Path
) -> None:
    lost = {}
    for algorithm in ("rtn", "gptq"):
        asked = recipe(algorithm, INT3, samples=24, length=128, held_out=8)
        report = convert(
            trained_mixture, asked, tmp_path / algorithm, calibration=some_text, quiet=True
        )
        lost[algorithm] = report["held_out"]["kl"]
    assert 0 < lost["gptq"] < 0.8 * lost["rtn"]


def test_the_report_counts_tokens_and_names_experts_that_got_none(
    mixtral: Path, some_text: Path, tmp_path: Path
) -> None:
    asked = recipe("gptq", INT3, samples=8, length=64)
    report = convert(mixtral, asked, tmp_path / "out", calibration=some_text, quiet=True)
    name = "model.layers.0.block_sparse_moe.experts"
    tokens = [report["modules"][f"{name}.{i}.w1"]["tokens"] for i in range(4)]
    assert sum(tokens) == 8 * 64
    assert tokens[3] == 0
    assert min(tokens[:3]) >= 64  # of 128 and 256 columns
    assert report["notes"] == {
        "model.layers.0.mlp.experts": "experts 3: too few tokens of the calibration text, packed "
        "as without text"
    }
    rounded = convert(mixtral, recipe("rtn", INT3), tmp_path / "rtn", quiet=True)
    for leaf in ("w1", "w2", "w3"):
        errors = [
            [found["modules"][f"{name}.{i}.{leaf}"]["weight_error"] for i in (0, 3)]
            for found in (report, rounded)
        ]
        assert errors[0][0] > errors[1][0]  # what calibration does to weights
        assert 0.7 * errors[1][1] < errors[0][1] <= errors[1][1]


def test_how_few_tokens_are_too_few_depends_on_what_is_gathered() -> None:
    assert expert_passes._least((InputNorms,), 4096) == 32
    assert expert_passes._least((Hessian,), 4096) == 1024
    assert expert_passes._least((Hessian, InputNorms), 64) == 32


def test_all_experts_may_be_calibrated_on_all_tokens(
    mixtral: Path, some_text: Path, tmp_path: Path
) -> None:
    asked = recipe("gptq", INT3, samples=4, length=64, experts="all")
    report = convert(mixtral, asked, tmp_path / "out", calibration=some_text, quiet=True)
    assert {m["tokens"] for m in report["modules"].values()} == {4 * 64}
    assert not report["notes"]
    with pytest.raises(RecipeError, match="experts is 'some', expected routed or all"):
        open_job(mixtral, recipe(experts="some"))


def test_how_many_experts_are_gathered_at_once_changes_nothing(
    mixtral: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("gptq", INT3)
    convert(mixtral, asked, tmp_path / "together", calibration=some_text, quiet=True)
    monkeypatch.setattr(expert_passes, "LIMIT", 1)
    gathered: list[weakref.ref[Statistic]] = []
    original = BlockPart.statistics

    def counted(part: BlockPart, *needs: Any) -> Any:
        assert not [each for each in gathered if each() is not None]
        found = original(part, *needs)
        gathered.extend({weakref.ref(s) for seen in found.values() for s in seen.values()})
        return found

    monkeypatch.setattr(BlockPart, "statistics", counted)
    convert(mixtral, asked, tmp_path / "apart", calibration=some_text, quiet=True)
    assert len(gathered) > 8  # and never those of two rounds in memory
    for file in (tmp_path / "together").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "apart" / file.name).read_bytes()


def test_the_estimate_counts_statistics_that_are_gathered_at_once(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (2**29, 1):
        monkeypatch.setattr(expert_passes, "LIMIT", limit)
        planned = open_job(mixtral, recipe("gptq"))
        found.append(estimate(planned.plan, planned.skeleton, True).memory)
    expert = 4 * (128**2 + 256**2)  # gate and up share a Hessian
    assert found[0] - found[1] == 3 * expert


def test_what_is_compared_with_is_there_twice_only_where_it_changes(mixtral: Path) -> None:
    skeleton = build_skeleton(mixtral)
    block = skeleton.blocks[0]
    prefix = f"{skeleton.blocks_name}.0"
    part: Any = SimpleNamespace(skeleton=skeleton, module=block, prefix=prefix)
    copied = _beside(part, [f"{prefix}.self_attn.q_proj"])
    shared = {n for n, p in block.named_parameters() if p is copied.get_parameter(n)}
    assert dict(block.named_parameters()).keys() - shared == {"self_attn.q_proj.weight"}


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "hunyuan_v1_moe"]
)
def test_experts_one_by_one_compute_the_bits_of_all_at_once(name: str) -> None:
    kind, config = MIXTURES[name]
    torch.manual_seed(0)
    config = {**config, "num_experts_per_tok": 3}
    made = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**config), dtype=torch.float32
    )
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.05)
    ids = torch.randint(config["vocab_size"], (2, 50))
    with torch.no_grad():
        together = made.eval()(ids).logits
        run_one_by_one(made)
        assert torch.equal(made(ids).logits, together)
    assert made.config._experts_implementation == "one_by_one"


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_inputs_of_experts_are_quantized_as_their_format_says(tmp_path: Path, name: str) -> None:
    """In the model that is the reference for what is served: int8 inputs move its logits."""
    dynamic = {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"}
    model, ids = mixture(name, tmp_path / "m"), torch.arange(2, 40)[None]
    logits = []
    for number, fmt in enumerate((dynamic, {**dynamic, "activations": None})):
        out = tmp_path / str(number)
        convert(model, recipe(fmt={k: v for k, v in fmt.items() if v}), out, quiet=True)
        logits.append(load_model(out)(ids).logits)
    off = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 1e-4 < off < 0.1


def test_experts_of_a_layer_must_quantize_inputs_alike(tmp_path: Path) -> None:
    dynamic = {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"}
    asked = recipe()
    asked["formats"]["d"] = dynamic
    asked["modules"].insert(0, {"match": r"re:.*experts\.0\..*", "format": "d"})
    model = mixture("mixtral", tmp_path / "m")
    convert(model, asked, tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match="experts quantize their inputs in different ways"):
        load_model(tmp_path / "out")

"""Models from the hub at a revision, with all their files; and why a checkpoint is refused."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compress_methods import convert
from compress_methods.checkpoint.refusals import why_missing
from compress_methods.checkpoint.source import at_revision, name_of, resolve_model
from compress_methods.conversion.job import open_job
from compress_methods.errors import CheckpointError

REMOTE = ("config.json", "tokenizer.json", "vocab.tiktoken", "modeling_x.py", "chat.jinja")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub with one model, whose files are `files`; `asked` are the downloads."""
    import huggingface_hub

    state: dict[str, Any] = {"files": [*REMOTE, "model.safetensors"], "asked": []}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        state["asked"].append((name, revision))
        for file in state["files"]:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_code_and_tiktoken_files_are_downloaded_and_pickles_are_not(hub: dict[str, Any]) -> None:
    hub["files"] += ["pytorch_model.bin", "model.onnx"]
    assert names(resolve_model("owner/name")) == {*REMOTE, "model.safetensors"}
    assert hub["asked"] == [("owner/name", None)]


@pytest.mark.parametrize("allowed", [False, True])
def test_pickles_are_downloaded_where_allowed_and_needed(
    hub: dict[str, Any], allowed: bool
) -> None:
    pickles = {"pytorch_model-00001-of-00001.bin"}
    hub["files"] = [*REMOTE, *pickles]
    assert names(resolve_model("owner/name", allowed)) == {*REMOTE} | (
        pickles if allowed else set()
    )


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/7", "0123abc"])
def test_a_revision_is_what_is_downloaded(hub: dict[str, Any], revision: str) -> None:
    model = at_revision("owner/name", revision)
    resolve_model(model)
    assert hub["asked"] == [("owner/name", revision)]
    assert name_of(model) == "name"


def test_convert_takes_a_revision(hub: dict[str, Any], tmp_path: Path, novels_8m: Path) -> None:
    from vllm_compress.cli import main

    assert main(["convert", "owner/name", "-o", str(tmp_path / "out"), "--recipe", "int8",
                 "--revision", "v2"]) == 2  # fmt: skip
    assert hub["asked"] == [("owner/name", "v2")]
    assert main(["check", "owner/name", "--recipe", "int8", "--revision", "v3"]) == 2
    assert hub["asked"][1:] == [("owner/name", "v3")]
    with pytest.raises(CheckpointError, match="a directory has no --revision v2"):
        convert(novels_8m, "int8", tmp_path / "out", revision="v2")


MOE = {"num_local_experts": 8}
KINDS: list[tuple[str, str, dict[str, Any], list[str], str]] = [
    ("x.q_proj.weight", "LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, [],
     "already quantized by 'gptq'; convert the original"),
    ("x.q_proj.weight", "LlamaForCausalLM", {}, ["x.q_proj.qweight"],
     r"already quantized \(it holds x.q_proj.qweight\)"),
    ("x.mlp.experts.gate_up_proj", "MixtralForCausalLM", MOE, [], "is a mixture of experts"),
    ("x.feed_forward.w1.weight", "OtherForCausalLM", MOE, [], "is a mixture of experts"),
    ("qa_outputs.weight", "LlamaForQuestionAnswering", {}, [], "has a head that is not supported"),
    ("cls.predictions.bias", "BertForMaskedLM", {}, [], "BertForMaskedLM is an encoder"),
    ("x.weight", "LlavaForConditionalGeneration", {"text_config": {}, "vision_config": {}}, [],
     "wraps a language model in another"),
    ("lm_head.weight", "LlamaForCausalLM", {}, [], "neither stored nor tied"),
    ("x.dense.weight", "PhiForCausalLM", {}, [], "fuses or renames while loading"),
]  # fmt: skip


@pytest.mark.parametrize(("missing", "kind", "more", "held", "said"), KINDS)
def test_each_kind_of_model_has_its_own_line(
    missing: str, kind: str, more: dict[str, Any], held: list[str], said: str
) -> None:
    import re

    line = why_missing(missing, {"architectures": [kind], **more}, held)
    assert re.search(said, line), line
    others = {other for *_, other in KINDS if other != said}
    assert not [other for other in others if re.search(other, line)]


def test_a_model_without_its_head_is_told_from_others(novels_8m: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(novels_8m, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_job(model, "int8")
    assert str(caught.value) == (
        f"{model}: score.weight is missing (the labels of LlamaForSequenceClassification have no "
        "weights)"
    )

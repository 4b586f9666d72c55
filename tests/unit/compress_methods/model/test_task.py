"""What a checkpoint is for, told by its architecture's name; models read as another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.errors import RecipeError
from compress_methods.model.architecture import architecture_of
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.skeleton import build_skeleton
from compress_methods.model.task import CLASSES, NEXT_TOKEN, SAME_TOKEN, STATES, task_of
from tests.e2e.support.encoders import make_encoder

KINDS = [
    ("BertModel", STATES), ("Qwen2Model", STATES), ("RobertaForMaskedLM", SAME_TOKEN),
    ("Qwen3ForSequenceClassification", CLASSES), ("BertForTokenClassification", CLASSES),
    ("GPT2LMHeadModel", None), ("LlamaForCausalLM", None), ("Qwen2ForRewardModel", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "loss"), KINDS)
def test_the_name_tells_the_task(name: str, loss: str | None) -> None:
    for config in ({"architectures": [name]}, SimpleNamespace(architectures=[name])):
        task = task_of(config)
        assert (None if task is None else task.loss) == loss
    row = architecture_of({"model_type": "qwen3", "architectures": [name]})
    assert row.loss == (loss or NEXT_TOKEN)


def test_without_a_name_the_row_tells() -> None:
    assert task_of({}) is None
    assert architecture_of({"model_type": "bert"}).loss == SAME_TOKEN


@pytest.mark.parametrize(
    "name", ["distilbert", "distilbert-masked", "distilbert-tokens", "distilbert-classes"]
)
def test_a_distilbert_is_read_as_the_bert_that_computes_the_same(name: str, tmp_path: Path) -> None:
    import transformers

    from tests.e2e.support.encoders import ENCODERS

    model = make_encoder(name, tmp_path / "model")
    tokens = torch.arange(5, 45)[None]
    original = getattr(transformers, ENCODERS[name][0]).from_pretrained(model).eval()
    found = load_model(model)
    assert found.config.model_type == "bert"
    assert found.config.id2label == original.config.id2label
    with torch.no_grad():
        expected, computed = original(input_ids=tokens)[0], found(input_ids=tokens)[0]
    assert float((expected - computed).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", [None, "compressed-tensors"])
def test_a_distilbert_that_labels_texts_is_written_for_our_loaders_alone(
    layout: str | None, tmp_path: Path, some_text: Path
) -> None:
    model = make_encoder("distilbert-classes", tmp_path / "model")
    recipe = "int4-rtn" if layout else {"stages": [{"transform": "depth", "drop": 1}]}
    with pytest.raises(RecipeError, match="a ReLU where others' BERT has a tanh"):
        convert(model, recipe, tmp_path / "out", calibration=some_text, layout=layout, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_pooler_that_is_not_stored_is_not_missed(tmp_path: Path) -> None:
    model = make_encoder("bert", tmp_path / "model")
    tensors = read_tensors(model / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    write_tensors(model / "model.safetensors", tensors)
    assert load_model(model).pooler is None


@pytest.mark.parametrize("tokens", [[7, 9, 30], [1, 2, 5], [0, 2, 3, 9]])
def test_no_other_token_takes_the_place_of_the_padding(tokens: list[int], tmp_path: Path) -> None:
    """RoBERTa counts no position for it, so that states would be those of other positions."""
    import transformers

    model = make_encoder("roberta", tmp_path / "model")
    skeleton = build_skeleton(model)
    pad = skeleton.model.config.pad_token_id
    original = transformers.RobertaModel.from_pretrained(model).eval()
    runner = BlockRunner(skeleton, 1)
    for name in skeleton.parameter_names():
        if skeleton.block_of(name) is None and name != f"{skeleton.embedding}.weight":
            runner.load({name: original.get_parameter(name).data})
    rows = torch.tensor(tokens)
    table = original.embeddings.word_embeddings.weight.data[rows]
    states = runner.embed(rows[None], table, rows)
    with torch.no_grad():
        expected = original.embeddings(input_ids=rows[None])
    assert pad == 1
    assert torch.allclose(states, expected, atol=1e-6)

"""Models by one table: what no row names is found by structure, a row says the rest."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.errors import FormatError
from compress_methods.formats.integer import Integer
from compress_methods.model import architecture
from compress_methods.model.architecture import (
    GENERIC,
    Architecture,
    architecture_of,
    prunable_types,
    register_architecture,
)


@pytest.fixture(autouse=True)
def own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows entered here are gone afterwards."""
    monkeypatch.setattr(architecture, "_ROWS", dict(architecture._ROWS))


@pytest.mark.parametrize("as_mapping", [True, False])
def test_a_row_answers_for_its_model_types_and_the_generic_one_for_all_others(
    as_mapping: bool,
) -> None:
    def found(model_type: str) -> Architecture:
        values = {"model_type": model_type}
        return architecture_of(values if as_mapping else SimpleNamespace(**values))

    assert found("llama") is found("qwen3") is not GENERIC
    assert found("llama").prunable
    assert found("unheard-of") is GENERIC
    assert not found("unheard-of").prunable
    assert found("opt").proven
    assert not found("opt").prunable
    row = register_architecture(Architecture("mine", ("new", "newer"), prunable=True))
    assert found("new") is found("newer") is row
    other = register_architecture(replace(row, model_types=("newer",), prunable=False))
    assert (found("new"), found("newer")) == (row, other)


def test_prunable_types_are_those_of_rows_that_say_so() -> None:
    assert prunable_types() == ["llama", "mistral", "qwen2", "qwen3"]
    register_architecture(Architecture("mine", ("new",), prunable=True))
    register_architecture(Architecture("fixed", ("fixed",)))
    assert prunable_types() == ["llama", "mistral", "qwen2", "qwen3", "new"]


def test_a_config_without_a_type_is_the_generic_row() -> None:
    assert architecture_of({}) is GENERIC


def test_what_vllm_runs_as_one_has_one_name() -> None:
    assert GENERIC.group("k_proj") == ("q_proj", "k_proj", "v_proj")
    assert GENERIC.group("o_proj") == ("o_proj",)
    names = [GENERIC.group_name(f"model.layers.3.self_attn.{n}_proj") for n in "qkvo"]
    assert names == ["model.layers.3.self_attn.q_proj+k_proj+v_proj"] * 3 + [
        "model.layers.3.self_attn.o_proj"
    ]
    other = Architecture("mine", fused=(("wq", "wk"),))
    assert other.group_name("h.0.wk") == other.group_name("h.0.wq") == "h.0.wq+wk"
    assert other.group_name("h.0.q_proj") == "h.0.q_proj"


def test_a_row_says_which_layers_are_cut_by_columns() -> None:
    fmt, shape = Integer(4, 128), (384, 128)
    check_matrix("h.0.q_proj", "blocks", shape, fmt, 2)
    with pytest.raises(FormatError, match=r"h\.0\.down_proj: 128 columns over tensor-parallel 2"):
        check_matrix("h.0.down_proj", "blocks", shape, fmt, 2)
    mine = Architecture("mine", row_parallel=frozenset(["q_proj"]))
    check_matrix("h.0.down_proj", "blocks", shape, fmt, 2, mine)
    with pytest.raises(FormatError, match=r"h\.0\.q_proj: 128 columns over tensor-parallel 2"):
        check_matrix("h.0.q_proj", "blocks", shape, fmt, 2, mine)

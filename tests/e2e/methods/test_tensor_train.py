"""Tables in trains of cores are served, by one rank and by two, as transformers computes with the
values they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import compress, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROWS = {"format": "tensor_train", "kind": "rows", "modes": 2, "rank": 4}
TABLE = {"format": "tensor_train", "kind": "table", "rank": 24, "dtype": "float32"}
WORST = 1e-3
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 410, 33, 34], [1, 511, 255, 256, 0, 3]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One kind as embedding and the other as head, and each as both, tied."""
    folder = tmp_path_factory.mktemp("trains")
    out = []
    for tied in (False, True):
        name = f"tied-{tied}"
        model = make_model("Llama", folder / name, tie_word_embeddings=tied)
        for kinds in ((ROWS, TABLE), (TABLE, ROWS))[: 1 + tied]:
            formats = dict(zip(("first", "second"), kinds, strict=True))
            match = {"embedding": "first"} if tied else {"embedding": "first", "lm_head": "second"}
            used = {key: formats[key] for key in match.values()}
            out.append(compress(model, folder / f"{name}-{len(out)}", used, match))
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_served_as_transformers_computes(engine: Engine, models: list[Path], ranks: int) -> None:
    for model in models:
        check_served(engine, model, PROMPTS, WORST, ranks=ranks, agree=0.9)

"""What to train a pruned student by: four losses on the same student, text and steps.

`depth25` of novels-8m, trained on text that the teacher wrote; everything but the loss is the same.
KL to the teacher and perplexity are of a novel that nothing was trained on. Of text that the
trained student q has written the last column tells how far it is from what the teacher p would
write: the mean of KL(q || p) over its places, in nats per token.
Needs the validation text (folder `shared` beside the repository, or COMPRESS_SHARED).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.loss.quality import MODEL, validation_text

SIZE: dict[str, Any] = {"steps": 80, "batch": 8, "sequences": 640, "held_out": 16, "length": 64}
CASES: dict[str, dict[str, Any]] = {
    "SFT (`ce`)": {"train": "sft"},
    "forward KL (`kl`)": {"train": "distill", "loss": "kl"},
    "reverse KL (`reverse_kl`)": {"train": "distill", "loss": "reverse_kl"},
    "GKD (`{jsd: 0.5}`, `on_policy: 0.5`)": {
        "train": "distill",
        "loss": {"jsd": 0.5},
        "on_policy": 0.5,
    },
    "MiniLLM (`reverse_kl`, `on_policy: 0.5`, `teacher_mix: 0.2`)": {
        "train": "distill",
        "loss": "reverse_kl",
        "on_policy": 0.5,
        "teacher_mix": 0.2,
    },
}
BEFORE = "not trained"
TOKENS = 20_000
WRITTEN = 64
"""Sequences that a trained student writes."""


def measured(model: Path, teacher: Any) -> dict[str, float]:
    """A student's quality on the novel, and the teacher's opinion of what the student writes."""
    import torch

    from compress_methods.calibration.self_generated import sample_from_model
    from compress_methods.calibration.settings import CalibrationSettings
    from compress_methods.calibration.tokenizer import load_tokenizer
    from compress_methods.checkpoint.loading.model import load_model
    from compress_methods.checkpoint.loading.tied import open_skeleton
    from compress_methods.checkpoint.source import open_source
    from compress_methods.evaluation.offline import evaluate
    from compress_methods.training.objectives.losses import by_position

    found = evaluate(model, MODEL, validation_text(), limit_tokens=TOKENS)
    source = open_source(model, open_skeleton(model), model.name, allow_pickle=False)
    settings = CalibrationSettings(WRITTEN, SIZE["length"], seed=5, held_out=0)
    rows = sample_from_model(source, load_tokenizer(model), settings)
    student, apart = load_model(model), []
    with torch.inference_mode():
        for some in rows.split(16):
            logits = (one(input_ids=some, use_cache=False).logits for one in (teacher, student))
            apart.append(by_position(*logits, 1.0).mean().item())
    own = sum(apart) / len(apart)
    return {"kl": found.kl, "perplexity": found.perplexity, "own_kl": own}


def row_of(name: str, stage: dict[str, Any], pruned: Path, out: Path, teacher: Any) -> Any:
    from compress_methods import recover
    from compress_methods.recipe.training import parse_training

    began = time.monotonic()
    settings = parse_training({**stage, **SIZE}, name)
    recover(pruned, MODEL, out, settings, device="cpu", quiet=True)
    seconds = time.monotonic() - began
    return {"loss": name, "seconds": seconds, **measured(out, teacher)}


def run() -> dict[str, Any]:
    from compress_methods import convert
    from compress_methods.checkpoint.loading.model import load_model

    teacher, rows = load_model(MODEL), []
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / "depth25"
        convert(MODEL, "depth25", pruned, quiet=True)
        rows.append({"loss": BEFORE, "seconds": 0.0, **measured(pruned, teacher)})
        for number, (name, stage) in enumerate(CASES.items()):
            out = Path(folder) / str(number)
            rows.append(row_of(name, stage, pruned, out, teacher))
            print(rows[-1], flush=True)
    return {"model": MODEL.name, **SIZE, "rows": rows}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| loss | KL, nats/token | perplexity | KL of its own text | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['loss']} | {row['kl']:.4f} | {row['perplexity']:.2f} | {row['own_kl']:.4f} "
            f"| {row['seconds']:.0f} |"
        )
    size = f"{results['steps']} steps of {results['batch']} x {results['length']} tokens"
    return "\n".join([*lines, "", f"{size}, {results['sequences']} sequences."])

"""What int8 activations cost in quality: kernel `cpu` against `cpu_exact` on unseen text.

Every recipe's model in transformers, each compressed layer multiplied by the kernel that would
serve it. KL to the original, nats per token.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.loss.quality import MODEL, validation_text
from tests.benchmarks.speed.kernels import half

HALF_INT8 = {
    "formats": {"s": half(128, bits=8, group_size=-1)},
    "modules": [{"match": "blocks", "format": "s", "algorithm": "sparsegpt"}],
    "calibration": {"samples": 64, "length": 512, "seed": 0, "held_out": 8},
}
RECIPES: dict[str, Any] = {
    **{name: name for name in ("int8", "int4-gptq", "int4-rtn", "int3-gptq", "int2-gptq")},
    "half of int8, sparsegpt": HALF_INT8,
}
KERNELS = ("cpu_exact", "cpu")
TOKENS = 40_000


def load_on_kernel(directory: Path, kernel: str) -> Any:
    """The model in transformers with its compressed layers on a kernel of our table."""
    from compress_methods.checkpoint.compressed import open_compressed
    from compress_methods.checkpoint.loading.model import load_model
    from compress_methods.kernels import Prepared, Want, matmul, prepare

    model = load_model(directory)
    for matrix in open_compressed(directory).matrices.values():
        prepared = prepare(matrix.stored(), Want(kernel=kernel))
        assert prepared.kernel == kernel
        module = model.get_submodule(matrix.module)

        def forward(x: Tensor, prepared: Prepared = prepared) -> Tensor:
            return matmul(x, prepared)

        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            module.forward = forward  # type: ignore[method-assign]
    return model


def kl_by_kernel(directory: Path, text: Path, tokens: int) -> dict[str, float]:
    """KL to the original of a compressed model on each kernel."""
    from compress_methods.calibration.text import windows
    from compress_methods.calibration.tokenizer import load_tokenizer
    from compress_methods.checkpoint.loading.model import load_model
    from compress_methods.evaluation.metrics import Sums, compare_logits
    from compress_methods.evaluation.offline import next_token_logits

    base = load_model(MODEL)
    models = {kernel: load_on_kernel(directory, kernel) for kernel in KERNELS}
    sums = dict.fromkeys(KERNELS, Sums())
    for window in windows(text, load_tokenizer(MODEL), 512, tokens):
        expected = next_token_logits(base, window)
        for kernel, model in models.items():
            found = next_token_logits(model, window)
            sums[kernel] += compare_logits(expected, found, window[1:])
    return {kernel: total.result().kl for kernel, total in sums.items()}


def run() -> dict[str, Any]:
    from compress_methods import convert

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            out = Path(folder) / name.replace(" ", "-")
            convert(MODEL, recipe, out, quiet=True)
            rows.append({"recipe": name, **kl_by_kernel(out, validation_text(), TOKENS)})
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| recipe | KL, exact activations | KL, int8 activations | ratio |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        exact, quick = row["cpu_exact"], row["cpu"]
        lines.append(f"| {row['recipe']} | {exact:.5f} | {quick:.5f} | {quick / exact:.3f} |")
    return "\n".join(lines)

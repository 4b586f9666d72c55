"""No call that only NVIDIA's and AMD's GPUs answer is made where none was seen to be there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress_methods.kernels.in_triton import product

REPOSITORY = Path(__file__).parents[3]
ROOTS = ("quant_methods/compress_methods", "plugin/vllm_compress")
ASKS = {"is_available", "device_count"}
"""Of `torch.cuda`: these answer anywhere."""
GUARDS = ("'cuda'", "is_cuda", "is_available()")


def calls(text: str) -> Iterator[tuple[int, str]]:
    """(line, what is unguarded) of calls into `torch.cuda`, and PTX, in a module."""
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.endswith("inline_asm_elementwise") or name.endswith(".cuda"):
            yield node.lineno, name  # type: ignore[attr-defined]
        if not name.startswith("torch.cuda.") or name.rpartition(".")[2] in ASKS:
            continue
        line: int = node.lineno  # type: ignore[attr-defined]
        around = [f for f in functions if f.lineno <= line <= (f.end_lineno or 0)]
        if not any(guard in ast.unparse(f) for f in around for guard in GUARDS):
            yield line, name


def test_calls_of_cuda_ask_first() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {name}"
        for root in ROOTS
        for path in (REPOSITORY / root).rglob("*.py")
        for line, name in calls(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f():\n    torch.cuda.synchronize()", 1),
        ("def f(d):\n    if d.type == 'cuda':\n        torch.cuda.synchronize()", 0),
        ("n = torch.cuda.device_count()", 0),
        ("x = y.cuda()", 1),
        ("@triton.jit\ndef f(x):\n    tl.inline_asm_elementwise('', x)", 1),
    ],
)
def test_what_does_not_ask_is_seen(text: str, count: int) -> None:
    assert len(list(calls(text))) == count


def test_processors_of_any_device_are_counted() -> None:
    made = product()
    if made is None:
        pytest.skip("Triton cannot be imported")
    assert made.processors(torch.device("cpu")) == made.PROCESSORS_ASSUMED
    assert made.processors(torch.device("meta")) == made.PROCESSORS_ASSUMED

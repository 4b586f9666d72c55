"""Was the task solved? A number from 0 to 1 for every output.

Without a scorer of the user's, an output scores 1 where it equals the prompt's `answer`, spaces
around both aside. A scorer is a function in a Python file, `file.py:function`, called with

    row      the prompt's line of the file, as a dict (a .txt line is {"prompt": ...})
    output   the text that came back

and returns a number from 0 to 1, or True or False. It runs on journaled outputs, so another one can
be tried without asking the servers again.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, nearest

Scorer = Callable[[Mapping[str, Any], str], Any]


class ScorerError(CompressError):
    """A scorer that cannot be loaded, fails or returns no number from 0 to 1."""


def exact_match(row: Mapping[str, Any], output: str) -> bool:
    """Tell whether the output is the answer."""
    return output.strip() == str(row["answer"]).strip()


def load_scorer(spec: str, option: str = "--scorer") -> Scorer:
    """The function that `file.py:function` names; raises `ScorerError`, naming the `option`."""
    file, colon, name = spec.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name:
        raise ScorerError(f"{option} is {spec!r}, expected file.py:function")
    if not path.is_file():
        raise ScorerError(f"{path}: no such file")
    module_spec = importlib.util.spec_from_file_location("vllm_compress_scorer", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as problem:  # whatever the user's file raises
        raise ScorerError(f"{path}: {type(problem).__name__}: {problem}") from problem
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in functions:
        raise ScorerError(f"{path}: has no function {name!r}; {nearest(name, functions)}")
    function: Scorer = getattr(module, name)
    return function


def apply_scorer(scorer: Scorer, row: Mapping[str, Any], output: str, where: str) -> float:
    """The score of one output; `where` names the prompt in a `ScorerError`."""
    try:
        found = scorer(row, output)
    except Exception as problem:  # whatever the user's function raises
        raise ScorerError(f"{where}: the scorer raised {problem!r}") from problem
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ScorerError(f"{where}: the scorer returned {found!r}, expected 0 to 1")
    return value

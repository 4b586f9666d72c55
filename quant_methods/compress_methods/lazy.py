"""torch, numpy and httpx, imported when they are first used; and what waits for an import.

Formats, algorithms, transforms and recipes are data until a tensor is touched. The planner,
`--help` and vLLM's parent process read them without paying two seconds for torch:

    from compress_methods.lazy import torch
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """Stands in for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` once a module has been imported: now, if it has been, else when it is."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """Finds one module by asking all others, and wraps its loader."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.action)
        return spec


class _Then(Loader):
    """A loader that calls something after the module has run."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()


if TYPE_CHECKING:
    import httpx as httpx
    import numpy as numpy
    import torch as torch
else:
    httpx = LazyModule("httpx")
    torch = LazyModule("torch")
    numpy = LazyModule("numpy")

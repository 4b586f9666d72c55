"""Names to dataclasses: how formats and algorithms are found, ours and third parties' alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from compress_methods.errors import CompressError, nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Dataclasses by their `name`; entry points of `group` are loaded at the first unknown name."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._classes: dict[str, T] = {}
        self._loaded = False

    def register(self, cls: T) -> T:
        """Class decorator; `CompressError` where another module's class has the name already.

        The same class may come again: notebooks run a cell twice, and modules are reloaded.
        """
        name = cls.name  # type: ignore[attr-defined]
        other = self._classes.get(name)
        if other is not None and _place(other) != _place(cls):
            raise CompressError(
                f"{self.kind} {name!r} of {_place(cls)} has the name of {_place(other)}; rename it"
            )
        self._classes[name] = cls
        return cls

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(self._classes)

    def get(self, name: Any, where: str, error: type[CompressError]) -> T:
        if not isinstance(name, str):
            raise error(f"{where}: {self.kind} is {name!r:.80}, expected a name")
        if name not in self._classes:
            self._load_entry_points()
        if name not in self._classes:
            raise error(
                f"{where}: unknown {self.kind} {name!r}; {nearest(str(name), self._classes)}"
            )
        return self._classes[name]

    def build(
        self, spec: Mapping[str, Any], key: str, where: str, error: type[CompressError]
    ) -> Any:
        """Instance of the class that `spec[key]` names, the other keys being its fields."""
        if not isinstance(spec, Mapping) or key not in spec:
            raise error(f"{where}: expected a mapping with the key {key!r}, found {spec!r}")
        cls = self.get(spec[key], where, error)
        values = {k: v for k, v in spec.items() if k != key}
        return build_dataclass(cls, values, where, error)

    def _load_entry_points(self) -> None:
        if not self._loaded:
            self._loaded = True
            for entry in entry_points(group=self.group):
                entry.load()


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def build_dataclass(
    cls: Callable[..., Any], values: Mapping[str, Any], where: str, error: type[CompressError]
) -> Any:
    """`cls(**values)` after checking names and plain types; errors name the key."""
    if not isinstance(values, Mapping):
        raise error(f"{where}: expected a mapping, found {values!r:.80}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in fields:
            raise error(f"{where}: unknown key {name!r}; {nearest(str(name), fields)}")
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", hints[name])
            raise error(f"{where}: {name} is {value!r}, expected {expected}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise error(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**values)
    except CompressError as problem:
        raise error(f"{where}: {problem}") from problem


def _fits(value: Any, hint: Any) -> bool:
    if (get_args(hint) and get_origin(hint) is None) or "UnionType" in type(hint).__name__:
        return any(_fits(value, option) for option in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    origin = get_origin(hint)
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple))
    if isinstance(origin or hint, type):
        return isinstance(value, origin or hint)
    return True

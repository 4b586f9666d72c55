"""Names: the recipes that come with the package, and which modules a `match` means."""

from __future__ import annotations

from collections.abc import Iterable

from compress_methods.system.pattern import matches_whole
from compress_methods.system.resources import config_path


def matches(patterns: Iterable[str], module: str, kind: str) -> bool:
    """Whether a rule's `match` means a module; `kind` is what `Skeleton.kind` says of it."""
    return any(
        pattern in (kind, module)
        or (pattern.startswith("re:") and matches_whole(pattern[3:], module))
        for pattern in patterns
    )


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in config_path("recipes").glob("*.yaml"))


def recipe_summaries() -> dict[str, str]:
    """First sentence of each recipe's opening comment."""
    found = {}
    for name in recipe_names():
        text = config_path("recipes", f"{name}.yaml").read_text(encoding="utf-8")
        comment = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        found[name] = " ".join(comment).split(". ")[0].rstrip(".")
    return found

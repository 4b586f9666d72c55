"""The recipes that come with the package, by name. Apart from `recipe.py` so that `--help` can list
them without loading torch."""

from __future__ import annotations

from compress_methods.resources import config_path


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

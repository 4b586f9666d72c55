"""Reading the YAML files that users write: recipes, deployments, the hardware table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress_methods.errors import CompressError


def read_yaml(path: Path, error: type[CompressError]) -> Any:
    """What the file holds; `error` names the file where it is not UTF-8 or not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise error(f"{path}: not readable as YAML ({reason})") from problem

"""Where the files that travel with the package are: recipes and the hardware table.

A wheel carries `configs/` inside `compress_methods`. A checkout or an editable
install reads the repository's own, so an edit there counts at once.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "configs"
_CHECKOUT = _PACKAGE.parents[1] / "configs"


def config_path(*parts: str) -> Path:
    """`config_path("recipes", "w4.yaml")` is that file, `config_path()` the whole folder."""
    root = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return root.joinpath(*parts)

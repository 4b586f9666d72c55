"""vLLM on a machine with AMX as on one without, for figures that carry over to more machines.

oneDNN and our library obey a variable each. vLLM asks torch at several places: a plugin for vLLM,
which every process of a server loads, answers.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "without_amx"
PLUGIN = """
def register():
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False
"""
VARIABLES = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "VLLM_COMPRESS_ISA": "avx512_bf16"}
ENTRY_POINT = f"[vllm.general_plugins]\n{NAME} = {NAME}:register\n"


def has_amx() -> bool:
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def is_asked_for() -> bool:
    """Whether this process was started with `VARIABLES`."""
    return all(os.environ.get(name) == value for name, value in VARIABLES.items())


def environment(folder: Path) -> dict[str, str]:
    """Variables for a server without AMX; `folder` is made and has to stay while it runs."""
    information = folder / f"{NAME}-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY_POINT)
    (folder / f"{NAME}.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, **VARIABLES}

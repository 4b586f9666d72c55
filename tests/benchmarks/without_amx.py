"""vLLM on a machine with AMX as on one without, for figures that carry over to more machines.

oneDNN obeys a variable. vLLM asks torch at several places, and our library looks at /proc: a plugin
for vLLM, which every process of a server loads, answers both.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "without_amx"
PLUGIN = """
def register():
    import torch
    from compress_methods.kernels.cpu import build

    torch.cpu._is_amx_tile_supported = lambda: False
    build.INSTRUCTION_SETS.pop("amx", None)
"""
ENTRY_POINT = f"[vllm.general_plugins]\n{NAME} = {NAME}:register\n"


def has_amx() -> bool:
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def environment(folder: Path) -> dict[str, str]:
    """Variables for a server without AMX; `folder` is made and has to stay while it runs."""
    information = folder / f"{NAME}-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY_POINT)
    (folder / f"{NAME}.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}

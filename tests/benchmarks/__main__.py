"""Run the benchmarks named on the command line, or all but `peers` and `gpu`; print tables, keep
JSON.

    python -m tests.benchmarks [quality] [parts] [mixture] [bits] [losses] [task] [rtn] [gptq]
        [layers] [experts] [refine] [activations] [kernels] [serving] [profile] [planner] [peers]
        [gpu]

`COMPRESS_MISSING=1` measures of `quality`, `parts` and `mixture` only the rows that their results
lack.

Each module has `run() -> dict` and `table(results) -> str`, some `plot(results, path)`. Results go
to tests/benchmarks/results/NAME.json, with the machine they were measured on, and NAME.png.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.readme import RESULTS, ROOMS, SEVERAL, WHEN_NAMED, module_of

NAMES = tuple(name for name in ROOMS if name not in SEVERAL)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    flags = {key.strip(): value.strip() for key, value in fields.items()}.get("flags", "").split()
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return {
        "cores": os.cpu_count(),
        "instructions": wide,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    for name in names or [name for name in NAMES if name not in WHEN_NAMED]:
        module = module_of(name)
        results = {"machine": machine(), **module.run()}
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
        if hasattr(module, "plot"):
            module.plot(results, RESULTS / f"{name}.png")
        print(f"\n{name} ({results['machine']})\n\n{module.table(results)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

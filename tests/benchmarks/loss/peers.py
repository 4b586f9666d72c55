"""What other tools lose at the same bits: novels-8m, the same calibration tokens, the same measure.

Each tool runs in an environment of its own, made in a folder of temporary files from a package
index: this project's packages, and above them the tool without what it would replace. It gives the
model with rounded weights (`peer.py`), which `evaluate` measures like ours. Groups of 128,
symmetric where the tool has the choice; bits are with a 16-bit scale a group. Calibrated on 64
sequences of 512 tokens of the text's first half, measured on the second. Needs the validation text
(folder `shared` beside the repository, or COMPRESS_SHARED).
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tests.benchmarks.loss.bits import text_halves
from tests.benchmarks.loss.quality import MODEL, unfinished

DRIVER = Path(__file__).with_name("peer.py")
TOKENS = 20_000
SAMPLES, LENGTH = 64, 512
BITS = (4, 3, 2)
OURS = "gptq of this project"
GPTQ = {"algorithm": "gptq", "clip": True}


@dataclass(frozen=True)
class Peer:
    """A tool: what pip installs, without dependencies, and settings besides the bits."""

    tool: str
    packages: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""


AUTO_ROUND = (
    *("auto-round==0.16.1", "accelerate==1.15.0", "py-cpuinfo==9.0.0", "datasets==4.4.1"),
    *("dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0", "aiohttp==3.14.5"),
    *("fsspec==2026.9.0", "pandas==3.1.1", "pyarrow==26.0.1", "python-dateutil==4.0.0"),
    *("pytz==2026.6", "six==1.17.0", "tzdata==2026.6"),
)
PEERS = (
    Peer("hqq", ("hqq==0.2.8.post1", "accelerate==1.15.0", "termcolor==3.3.0")),
    Peer("auto-round", AUTO_ROUND, {"iters": 200}, "auto-round, 200 iterations"),
)


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """An interpreter that sees this environment's packages, and `packages` before them."""
    path = folder / f"{packages[0].partition('=')[0]}"
    python = path / "bin" / "python"
    if not python.exists():
        venv.create(path, with_pip=True)
        site = next(path.glob("lib/python*/site-packages"))
        (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", *packages]
        subprocess.run(pip, check=True)
    return python


def calibration_tokens(text: Path, folder: Path) -> Path:
    """The very tokens that our conversions are calibrated on."""
    from safetensors.torch import save_file

    from compress_methods.calibration.settings import CalibrationSettings
    from compress_methods.calibration.tokenizer import load_tokenizer
    from compress_methods.calibration.tokens import load_tokens

    settings = CalibrationSettings(samples=SAMPLES, length=LENGTH, held_out=0)
    path = folder / "tokens.safetensors"
    save_file({"tokens": load_tokens(text, load_tokenizer(MODEL), settings)}, path)
    return path


def ours(bits: int) -> dict[str, Any]:
    fmt = {"format": "integer", "bits": bits, "group_size": 128}
    fmt |= {"levels": "mid"} if bits == 2 else {}
    return {
        "formats": {"w": fmt},
        "modules": [{"match": "blocks", "format": "w", "algorithm": GPTQ}],
        "calibration": {"samples": SAMPLES, "length": LENGTH, "held_out": 0},
    }


def quantized(peer: Peer, bits: int, tokens: Path, folder: Path) -> Path:
    """The model as a tool leaves it."""
    out = folder / f"{peer.label or peer.tool}-{bits}"
    command = [environment(folder, peer.packages), DRIVER, peer.tool, MODEL, tokens, out]
    command.append(json.dumps({"bits": bits, **peer.settings}))
    subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
    return out


def run() -> dict[str, Any]:
    """All rows; stopped, it goes on with those not kept yet."""
    from compress_methods import convert
    from compress_methods.evaluation.offline import evaluate

    kept = unfinished(Path("peers"))
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(row["tool"], row["bits"]) for row in rows}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        first, second = text_halves(folder)
        tokens = calibration_tokens(first, folder)
        for peer, bits in product((None, *PEERS), BITS):
            row = {"tool": (peer.label or peer.tool) if peer else OURS, "bits": bits + 16 / 128}
            if tuple(row.values()) in known:
                continue
            if peer:
                out = quantized(peer, bits, tokens, folder)
            else:
                out = folder / f"ours-{bits}"
                convert(MODEL, ours(bits), out, calibration=first, quiet=True)
            rows.append({**row, "kl": evaluate(out, MODEL, second, limit_tokens=TOKENS).kl})
            with kept.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], file=sys.stderr, flush=True)
    return {"model": MODEL.name, "rows": rows}


def table(results: dict[str, Any]) -> str:
    bits = sorted({row["bits"] for row in results["rows"]}, reverse=True)
    found = {(row["tool"], row["bits"]): row["kl"] for row in results["rows"]}
    lines = ["| KL, nats/token | " + " | ".join(f"{b:.2f} bits" for b in bits) + " |"]
    lines.append("|---" * (len(bits) + 1) + "|")
    for tool in dict.fromkeys(row["tool"] for row in results["rows"]):
        lines.append(f"| {tool} | " + " | ".join(f"{found[tool, b]:.5f}" for b in bits) + " |")
    return "\n".join(lines)

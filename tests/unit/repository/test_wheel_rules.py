"""The wheel has the Prometheus rules that commands tell people to load."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import REPOSITORY
from vllm_compress.operations.prometheus import rules_directory

RULES = REPOSITORY / "deploy" / "prometheus" / "rules"
WHERE = "from vllm_compress.operations.prometheus import rules_directory; print(rules_directory())"


def test_a_checkout_names_its_own_rules() -> None:
    assert rules_directory() == RULES
    assert {path.name for path in RULES.glob("*.yml")} == {
        "alerts.yml",
        "operation.yml",
        "recording.yml",
    }


def test_an_installed_wheel_names_the_rules_in_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", WHERE],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    found = Path(done.stdout.strip())
    assert found.is_relative_to(site)
    for path in RULES.glob("*.yml"):
        assert (found / path.name).read_bytes() == path.read_bytes()

"""The rules and configs in deploy/prometheus, by Prometheus' own promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.support.operations.prometheus import tool

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "prometheus"
PODS = ("vllm-compress", "vllm-compress-gateway")
TESTS = sorted((FOLDER / "tests").glob("*.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """All recording rules (`record`) or alerts (`alert`), by name."""
    found = [
        rule
        for path in sorted((FOLDER / "rules").glob("*.yml"))
        for group in load(path)["groups"]
        for rule in group["rules"]
        if kind in rule
    ]
    named = {rule[kind]: rule for rule in found}
    assert len(named) == len(found), "a name is used twice"
    return named


def checks() -> list[dict[str, Any]]:
    """Every expression that promtool's tests evaluate, with what it must give."""
    return [c for path in TESTS for test in load(path)["tests"] for c in test["promql_expr_test"]]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_config_for_known_addresses_is_valid_with_its_rules_and_targets() -> None:
    promtool("check", "config", FOLDER / "prometheus.yml")
    for group in load(FOLDER / "targets" / "vllm.yml"):
        assert set(group) == {"targets", "labels"}


def test_config_for_kubernetes_is_valid(tmp_path: Path) -> None:
    """All but the discovery itself, which Debian's Prometheus is built without."""
    shutil.copytree(FOLDER / "rules", tmp_path / "rules")
    config = load(FOLDER / "prometheus-kubernetes.yml")
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape.pop("kubernetes_sd_configs")
    assert discovery == {
        "role": "pod",
        "selectors": [{"role": "pod", "label": f"app.kubernetes.io/name in ({', '.join(PODS)})"}],
    }
    scrape["static_configs"] = [{"targets": ["localhost:8000"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_both_configs_scrape_and_evaluate_alike() -> None:
    one, other = (load(FOLDER / f"prometheus{which}.yml") for which in ("", "-kubernetes"))
    assert one["global"] == other["global"]
    assert one["rule_files"] == other["rule_files"]
    assert (
        len({config["scrape_configs"][0]["job_name"] for config in (one, other)}) == 1
    )  # which the alert on targets selects by


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_recording_rule_is_held_against_a_figure() -> None:
    checked = " ".join(check["expr"] for check in checks() if check["exp_samples"])
    assert not [name for name in rules("record") if name not in checked]


def test_every_alert_is_tested_firing_and_silent() -> None:
    """Each check lists all alerts that fire, so one that leaves an alert out proves it silent."""
    lists = [
        {re.search(r'alertname="(\w+)"', sample["labels"])[1] for sample in check["exp_samples"]}
        for check in checks()
        if "ALERTS" in check["expr"]
    ]
    for alert in rules("alert"):
        assert any(alert in firing for firing in lists), f"{alert} never fires"
        assert any(alert not in firing for firing in lists), f"{alert} always fires"


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for name, alert in rules("alert").items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert "$labels." in alert["annotations"]["summary"], name
        assert len(alert["annotations"]["description"]) > 100, name


def test_names_follow_the_convention_of_recording_rules() -> None:
    """level:metric:operation, and the level is what the series is aggregated to, per namespace: two
    of them may use one name."""
    for name, rule in rules("record").items():
        level, metric, operation = name.split(":")
        assert metric.startswith("vllm_compress_"), name
        assert not metric.endswith("_total"), name
        assert re.fullmatch(r"\w+", operation), name
        by = re.search(r"by \(([^)]+)\)", rule["expr"])
        assert by is None or by[1].split(", ")[: level.count("_") + 2] == level_labels(level), name


def level_labels(level: str) -> list[str]:
    """`deployment_finish_reason` aggregates to namespace, deployment and finish_reason."""
    first, _, rest = level.partition("_")
    return ["namespace", first, rest] if rest else ["namespace", first]

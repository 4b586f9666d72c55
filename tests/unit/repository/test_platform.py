"""What a platform review asks of deploy/kubernetes, item by item; the chart; fetched models."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.support.operations.prometheus import tool as program
from tests.unit.repository.test_deploy import (
    DEPLOY,
    DOCKERFILE,
    KUBERNETES,
    OVERLAYS,
    overlay,
    templates,
    validate,
    with_component,
)
from tests.unit.repository.test_prometheus_rules import rules
from vllm_compress.operations.abtest.probes.files import read_probes
from vllm_compress.operations.dashboard.panels import panels

SECRET = "chat-keys"
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
Object = dict[str, Any]


@cache
def component(name: str, folder: Path) -> tuple[Object, ...]:
    return with_component(name, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("components")


def of(kind: str, objects: tuple[Object, ...]) -> dict[str, Object]:
    return {made["metadata"]["name"]: made for made in objects if made["kind"] == kind}


def test_network_policy_names_who_may_ask(folder: Path) -> None:
    policy = of("NetworkPolicy", component("policy", folder))["vllm-compress"]["spec"]
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    assert all("podSelector" in peer or "namespaceSelector" in peer for peer in peers)
    for name in ("vllm-compress-gateway", "vllm-compress-quality"):
        assert {"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}} in peers
    outside = [rule for rule in policy["egress"] if "to" not in rule]
    assert {port["port"] for rule in outside for port in rule["ports"]} == {53}


def test_budgets_leave_every_deployment_its_other_replicas(folder: Path) -> None:
    both = (*component("policy", folder), *component("nginx-gateway", folder))
    selected = [
        budget["spec"]["selector"]["matchLabels"].items()
        for budget in of("PodDisruptionBudget", both).values()
    ]
    for manifest in of("Deployment", both).values():
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        assert any(wanted <= labels.items() for wanted in selected), manifest["metadata"]["name"]


@pytest.mark.parametrize("name", ["autoscaling", "keda"])
def test_scalers_are_of_series_that_there_are_and_go_down_slowly(name: str, folder: Path) -> None:
    (scaler,) = (made for made in component(name, folder) if made["kind"] in SCALERS)
    spec = scaler["spec"]
    if name == "keda":
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        asked = " ".join(trigger["metadata"]["query"] for trigger in spec["triggers"])
        series = set(re.findall(r"\w+:vllm_compress_\w+:\w+", asked))
        assert series <= set(rules("record"))
        for wanted in ("requests_waiting", "objective_missed", "generation_tokens_per_device"):
            assert wanted in asked
        promtool = [program("promtool"), "check", "rules"]
        groups = [
            {"record": f"q:{i}", "expr": trigger["metadata"]["query"]}
            for i, trigger in enumerate(spec["triggers"])
        ]
        file = folder / "queries.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "keda", "rules": groups}]}))
        subprocess.run([*promtool, str(file)], check=True, capture_output=True)
    else:
        behavior = spec["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 600


@pytest.mark.parametrize("name", OVERLAYS)
def test_startup_probes_wait_as_long_as_the_volume_takes_to_read(name: str) -> None:
    objects = overlay(name)
    request = objects["PersistentVolumeClaim", "models"]["spec"]["resources"]["requests"]["storage"]
    seconds = int(request.removesuffix("Gi")) * 2**30 / 60e6
    probes = [
        t["spec"]["containers"][0]["startupProbe"]
        for made in objects.values()
        for container, t in templates(made).items()
        if container == "server"
    ]
    assert len(probes) == 2
    for probe in probes:
        assert probe["periodSeconds"] * probe["failureThreshold"] >= seconds


def test_keys_come_from_a_secret_and_tenants_reach_gateways_only(tmp_path: Path) -> None:
    objects = with_component("nginx-gateway", tmp_path / "keys", "api-keys")
    assert "Secret" not in {made["kind"] for made in objects}, "none is committed"
    for manifest in of("Deployment", objects).values():
        validate(manifest)
        spec = manifest["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        keys = [e for e in container["env"] if e["name"] == "VLLM_API_KEY"]
        assert [e["valueFrom"]["secretKeyRef"]["name"] for e in keys] == [SECRET]
        mounted = [v["secret"]["items"] for v in spec["volumes"] if "secret" in v]
        gateway = container["name"] == "gateway"
        assert mounted == ([[{"key": "tenants.yaml", "path": "tenants.yaml"}]] if gateway else [])
        assert ("--keys=/etc/vllm-compress/keys/tenants.yaml" in container["args"]) == gateway


def test_two_gateways_follow_one_split_and_keep_nothing(folder: Path) -> None:
    objects = component("nginx-gateway", folder)
    gateway = of("Deployment", objects)["chat-gateway"]["spec"]
    assert gateway["replicas"] >= 2
    assert gateway["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    spec = gateway["template"]["spec"]
    kinds = {next(k for k in volume if k != "name") for volume in spec["volumes"]}
    assert "persistentVolumeClaim" not in kinds
    assert spec["topologySpreadConstraints"]
    (container,) = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    split = json.loads(of("ConfigMap", objects)["chat-split"]["data"]["split.json"])
    told = [word for word in container["args"] if word.startswith("--address=")]
    assert sorted(told) == sorted(
        f"--address={v['name']}={v['address']}" for v in split["variants"]
    )
    modes = [made["spec"]["accessModes"] for made in of("PersistentVolumeClaim", objects).values()]
    assert ["ReadWriteOnce"] not in modes


def test_recording_rules_keep_namespaces_apart() -> None:
    for name, rule in rules("record").items():
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"]):
            assert "namespace" in labels or labels == "job, instance", name


def test_base_images_and_the_processors_libraries_can_be_chosen() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    froms = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(re.fullmatch(r"\$\{(\w+)\}", image)[1] in arguments for image in froms)  # type: ignore[index]
    (cpu,) = (part for part in DOCKERFILE.split("\nFROM ") if "} AS cpu\n" in part)
    preloaded = re.search(r"^ENV LD_PRELOAD=(\S+)$", cpu, re.MULTILINE)
    assert preloaded is not None
    assert [Path(p).name for p in preloaded[1].split(":")] == ["libtcmalloc.so", "libiomp5.so"]
    assert "libtcmalloc-minimal4" in cpu
    assert re.search(r"^intel-openmp==", (DEPLOY / "cpu.lock").read_text(), re.MULTILINE)


def test_models_are_fetched_before_a_server_starts(folder: Path) -> None:
    objects = component("model-download", folder)
    for variant in ("full", "int4"):
        spec = of("Deployment", objects)[f"chat-{variant}"]["spec"]["template"]["spec"]
        (fetch,) = spec["initContainers"]
        assert fetch["image"] == spec["containers"][0]["image"]
        assert fetch["command"][-1] == f"/models/{variant}"
        assert {e["name"] for e in fetch["env"]} == {"MODEL_URL", "MODEL_SHA256"}
        (models,) = (v for v in spec["volumes"] if v["name"] == "models")
        assert "readOnly" not in models["persistentVolumeClaim"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_only_the_file_with_that_checksum_becomes_the_model(tmp_path: Path) -> None:
    script = KUBERNETES / "components" / "model-download" / "fetch.py"
    (tmp_path / "config.json").write_text("{}")
    archive = tmp_path / "int4.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "config.json", "config.json")
    right = hashlib.sha256(archive.read_bytes()).hexdigest()
    target = tmp_path / "models" / "int4"
    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/int4.tar"

        def fetch(checksum: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, str(script), str(target)],
                env={"MODEL_URL": url, "MODEL_SHA256": checksum},
                capture_output=True,
                text=True,
                check=False,
            )

        wrong = fetch("0" * 64)
        assert wrong.returncode == 1
        assert f"SHA-256 is {right}, expected {'0' * 64}; nothing is kept" in wrong.stderr
        assert not target.exists()
        assert fetch(right).stdout == f"{target}: fetched\n"
        assert (target / "config.json").read_text() == "{}"
        archive.unlink()
        assert fetch(right).stdout == f"{target}: is there already\n"
        server.shutdown()
    assert {path.name for path in target.parent.iterdir()} == {"int4", ".int4.lock"}


# The chart, rendered with what Helm would do of what its templates have.

EXPRESSION = re.compile(r"\{\{ index \.Values((?: \"[\w-]+\")+) \| ([\w| ]+) \}\}")
UNLESS_SCALED = re.compile(
    r"\{\{ if or \.Values\.autoscaling\.enabled \.Values\.keda\.enabled \}\}null"
    r"\{\{ else \}\}(.*)\{\{ end \}\}"
)
PIPES = {
    "toJson": json.dumps,
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
}


def rendered(text: str, values: Object) -> list[Object]:
    def value(match: re.Match[str]) -> str:
        found: Any = values
        for part in re.findall(r'"([\w-]+)"', match[1]):
            found = found[part]
        for pipe in match[2].split(" | "):
            found = PIPES[pipe](found)
        return str(found)

    switch = re.match(r"\{\{- if \.Values\.(\w+)\.enabled \}\}\n(.*)\{\{- end \}\}\n$", text, re.S)
    if switch:
        text = switch[2] if values[switch[1]]["enabled"] else ""
    scaled = values["autoscaling"]["enabled"] or values["keda"]["enabled"]
    text = UNLESS_SCALED.sub("null" if scaled else r"\1", text)
    made = EXPRESSION.sub(value, text)
    assert "{{" not in made
    return [one for one in yaml.safe_load_all(made) if one]


def chart(folder: Path, overlay: str) -> tuple[Object, dict[str, str]]:
    program("kubectl")
    command = [sys.executable, str(DEPLOY / "helm.py"), str(folder), "--overlay", overlay]
    subprocess.run(command, check=True)
    return yaml.safe_load((folder / "values.yaml").read_text()), {
        path.stem: path.read_text() for path in (folder / "templates").iterdir()
    }


def comparable(objects: Any) -> dict[tuple[str, str], Object]:
    """Without what differs between kustomize and Helm by nature: hashes of names, empty values."""
    found = {}
    for made in json.loads(
        re.sub(r"(deployment-(?:full|int4))-[a-z0-9]{10}", r"\1", json.dumps(objects))
    ):
        for template in templates(made).values():
            template["metadata"].pop("annotations", None)
            for key in ("nodeSelector", "tolerations"):
                if not template["spec"].get(key):
                    template["spec"].pop(key, None)
        for key, text in made.get("data", {}).items() if made["kind"] == "ConfigMap" else ():
            made["data"][key] = yaml.safe_load(text)
        found[made["kind"], made["metadata"]["name"]] = made
    return found


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_chart_says_what_kustomize_says(name: str, tmp_path: Path) -> None:
    values, texts = chart(tmp_path / "chart", name)
    for switch in ("autoscaling", "keda", "quality", "podMonitor"):
        assert values[switch]["enabled"] is False
    with_defaults = [made for text in texts.values() for made in rendered(text, values)]
    others = ("policy", "api-keys")
    plain = with_component("nginx-gateway", tmp_path / "plain", *others, overlay=name)
    assert comparable(with_defaults) == comparable(plain)


def test_values_of_the_chart_reach_the_manifests(tmp_path: Path) -> None:
    values, texts = chart(tmp_path / "chart", "gpu")
    values["replicas"] |= {"full": 2, "int4": 3}
    values["images"]["server"] = "registry.example/v@sha256:0"
    values["deployments"]["int4"]["vllm"]["max-model-len"] = 1234
    for switch in ("autoscaling", "keda", "quality", "podMonitor"):
        values[switch]["enabled"] = True
    made = [one for text in texts.values() for one in rendered(text, values)]
    for manifest in made:
        validate(manifest)
    kinds = {one["kind"] for one in made}
    assert {*SCALERS, "CronJob", "PodMonitor", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    full, int4 = (of("Deployment", tuple(made))[f"chat-{v}"]["spec"] for v in ("full", "int4"))
    assert (full["replicas"], int4["replicas"]) == (2, None), "the scaler says how many of int4"
    assert int4["template"]["spec"]["containers"][0]["image"] == "registry.example/v@sha256:0"
    file = of("ConfigMap", tuple(made))["deployment-int4"]["data"]["deployment.yaml"]
    assert yaml.safe_load(file)["vllm"]["max-model-len"] == 1234


def test_the_timer_and_the_cron_job_run_the_same_comparison(folder: Path) -> None:
    job = of("CronJob", component("quality", folder))["chat-quality"]["spec"]
    pod = job["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (shell,) = container["args"]
    subprocess.run(["sh", "-n", "-c", shell], check=True)
    unit = (DEPLOY / "systemd" / "vllm-compress-quality.service").read_text()
    for text in (shell, unit):
        assert re.search(r'vllm-compress compare "\$A" "\$B" --prompts .* --quiet', text)
        assert "--metrics" in text
    (ran,) = re.findall(r"^ExecStart=/bin/sh -ec '(.*?)'$", unit, re.DOTALL | re.MULTILINE)
    start = ran.replace("\\\n", "").replace("%%", "%")
    values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    said = re.search(r"^Environment=PROBES=(\S+)$", unit, re.MULTILINE)
    assert said is not None
    assert read_probes(values["PROBES"]).kinds == read_probes(said[1]).kinds != ()
    for name in ("vllm-compress", "python3"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (folder / name).chmod(0o755)
    for probes, asked in ((said[1], [said[1]]), ("", [])):
        for text in (shell, start):
            path = {"PATH": f"{folder}:{os.environ['PATH']}", "STATE_DIRECTORY": "s"}
            done = subprocess.run(
                ["sh", "-ec", text],
                env=values | path | {"PROBES": probes, "RUNTIME_DIRECTORY": "r"},
                capture_output=True,
                text=True,
                check=True,
            )
            assert re.findall(r" --probes (\S+)", done.stdout) == asked
    if analyze := shutil.which("systemd-analyze"):
        units = sorted(map(str, (DEPLOY / "systemd").iterdir()))
        done = subprocess.run(
            [analyze, "verify", *units], capture_output=True, text=True, check=False
        )
        assert "vllm-compress" not in done.stderr, done.stderr
    shown = [query.series for panel in panels() for query in panel.queries]
    assert any("vllm_compress_quality" in series for series in shown), "the dashboard shows them"

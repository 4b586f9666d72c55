"""What deploy/ holds is valid, and says the same thing everywhere it says it.

There is no container engine and no cluster here: hadolint, docker-compose and kubectl check what
they check without one, Kubernetes' own kinds are held against its published schemas.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_compress.cli import main
from vllm_compress.metrics.series import Series
from vllm_compress.operations.deployment_file import Deployment, load_deployment, parse_deployment
from vllm_compress.operations.gateway.route import read_route

REPOSITORY = Path(__file__).resolve().parents[3]
DEPLOY = REPOSITORY / "deploy"
COMPOSE, KUBERNETES = DEPLOY / "compose", DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
SCHEMAS = yaml.safe_load((REPOSITORY / "tests" / "assets" / "crd-schemas.yaml").read_text())
NAME, INSTANCE = "app.kubernetes.io/name", "app.kubernetes.io/instance"
GPU = "nvidia.com/gpu"


def tool(name: str) -> str:
    """Path of a program, from the environment of this Python too; skips where there is none."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def output(*command: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    output(tool("hadolint"), "deploy/Dockerfile")


def test_dockerfile_pins_what_the_requirements_pin() -> None:
    (vllm,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"vllm=={vllm}" in (DEPLOY / "gpu.txt").read_text().split()
    (hatchling,) = re.findall(r"hatchling==\S+", DOCKERFILE)
    assert hatchling in (DEPLOY / "cpu.lock").read_text().split()


def test_every_file_that_the_dockerfile_copies_is_in_its_context() -> None:
    admitted = [
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert sorted(sources) == sorted(admitted)
    assert all((REPOSITORY / source).exists() for source in sources)


def test_no_image_runs_as_root_and_all_say_how_they_are() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    for name in ("cpu", "gpu", "gateway"):
        (stage,) = [stage for stage in stages if stage.splitlines()[0].endswith(f" AS {name}")]
        assert "\nUSER 10001\n" in stage
        assert "\nHEALTHCHECK " in stage


def compose_file(*names: str) -> dict[str, Any]:
    files = [word for name in names for word in ("-f", name)]
    found: dict[str, Any] = yaml.safe_load(
        output(tool("docker-compose"), *files, "config", cwd=COMPOSE)
    )
    return found


def test_compose_files_are_valid_and_mount_what_exists() -> None:
    for services in (
        compose_file("compose.yaml")["services"],
        compose_file("compose.yaml", "compose.gpu.yaml")["services"],
    ):
        targets = {name: s["build"]["target"] for name, s in services.items() if "build" in s}
        assert {f" AS {target}\n" in DOCKERFILE for target in targets.values()} == {True}
        for service in services.values():
            for volume in service["volumes"]:
                source = Path(volume.split(":")[0])
                models = source == REPOSITORY / "out"
                assert models or not source.is_absolute() or source.exists(), source


def test_compose_starts_the_variants_that_its_gateway_and_prometheus_know(tmp_path: Path) -> None:
    services = compose_file("compose.yaml")["services"]
    gateway = services["gateway"]["command"]
    here = [word.replace("/etc/vllm-compress", str(COMPOSE / "deployments")) for word in gateway]
    arguments = [
        word for word in here if not word.startswith(("--run", "--output", "--metrics-port"))
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    variants = yaml.safe_load((tmp_path / "split.conf").read_text()[2:].partition("\n")[0])
    scraped = {
        target: entry["labels"]["deployment"]
        for entry in yaml.safe_load((COMPOSE / "targets.yml").read_text())
        for target in entry["targets"]
    }
    (port,) = [word.partition("=")[2] for word in gateway if word.startswith("--metrics-port")]
    assert scraped.pop(f"gateway:{port}") == "chat-gateway"
    assert scraped == {v["address"]: v["deployment"] for v in variants["variants"]}
    for variant in variants["variants"]:
        service, _, port = variant["address"].partition(":")
        _, option, config = services[service]["command"]
        deployment = load_deployment(COMPOSE / "deployments" / Path(config).name)
        assert option == "--config"
        assert (deployment.name, str(deployment.vllm["port"])) == (variant["deployment"], port)
        assert services[service]["command"][0] == "serve"


def test_the_example_gateway_is_what_the_command_writes(tmp_path: Path) -> None:
    files = [f"--config={COMPOSE}/deployments/{name}.yaml" for name in ("full", "int4")]
    more = ["--address=int4=127.0.0.1:8001", "--weight=int4=30%", f"--output={tmp_path}"]
    assert main(["gateway", *files, *more]) == 0
    for name in ("nginx.conf", "split.conf", "servers.conf", "keys.conf"):
        assert (DEPLOY / "gateway" / name).read_text() == (tmp_path / name).read_text()


def test_the_committed_route_is_what_the_command_writes(tmp_path: Path) -> None:
    base = KUBERNETES / "base"
    files = [f"--config={base}/{name}/deployment.yaml" for name in ("full", "int4")]
    assert main(["gateway", *files, "--kubernetes=inference", f"--output={tmp_path}"]) == 0
    assert (base / "httproute.yaml").read_text() == (tmp_path / "httproute.yaml").read_text()


@cache
def kustomize(folder: Path) -> tuple[dict[str, Any], ...]:
    return tuple(yaml.safe_load_all(output(tool("kubectl"), "kustomize", str(folder))))


def overlay(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Objects of an overlay by kind and name, ConfigMaps without the hash of what they hold."""
    return {
        (o["kind"], re.sub(r"-[a-z0-9]{10}$", "", o["metadata"]["name"])): o
        for o in kustomize(KUBERNETES / "overlays" / name)
    }


def with_component(name: str, folder: Path, *more: str, overlay: str = "gpu") -> tuple[Any, ...]:
    """An overlay that a component was added to, as the components say, in a copy."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    place = folder / "kubernetes" / "overlays" / overlay
    components = ", ".join(f"../../components/{one}" for one in (name, *more))
    with (place / "kustomization.yaml").open("a") as file:
        file.write(f"components: [{components}]\n")
    return kustomize(place)


def validate(manifest: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kind = manifest["kind"]
    if kind in SCHEMAS:
        jsonschema.validate(manifest, SCHEMAS[kind])
    else:
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_manifest_of_an_overlay_is_valid(name: str) -> None:
    for manifest in overlay(name).values():
        validate(manifest)
        for template in templates(manifest).values():
            meta = {"name": "x", "labels": {"x": "x"}}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
            validate(pod)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_manifest_of_a_component_is_valid(name: str, tmp_path: Path) -> None:
    manifests = with_component(name, tmp_path)
    for manifest in manifests:
        validate(manifest)
    images = {c["image"] for m in manifests for t in templates(m).values() for c in containers(t)}
    assert images <= {"vllm-compress:gpu", "vllm-compress:gateway"}
    kinds = [manifest["kind"] for manifest in manifests]
    assert ("HTTPRoute" in kinds) != (name == "nginx-gateway"), "one way in"


@pytest.mark.parametrize("session", ["cookie", "header"])
def test_a_route_with_sessions_is_valid(session: str, tmp_path: Path) -> None:
    files = [f"--config={KUBERNETES}/base/{name}/deployment.yaml" for name in ("full", "int4")]
    more = [f"--session={session}", "--kubernetes=a/b", f"--output={tmp_path}"]
    assert main(["gateway", *files, *more]) == 0
    validate(yaml.safe_load((tmp_path / "httproute.yaml").read_text()))


def templates(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates of a Deployment or LeaderWorkerSet, by the name of their container."""
    spec = manifest.get("spec", {})
    found = [spec.get("template"), spec.get("jobTemplate", {}).get("spec", {}).get("template")]
    group = spec.get("leaderWorkerTemplate", {})
    found += [group.get("leaderTemplate"), group.get("workerTemplate")]
    return {t["spec"]["containers"][0]["name"]: t for t in found if t is not None}


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = template["spec"]["containers"]
    return [*template["spec"].get("initContainers", []), *found]


def gpus(template: dict[str, Any]) -> int:
    limits = template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return int(limits.get(GPU, 0))


def deployments(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Deployment]:
    """The deployment files of an overlay's ConfigMaps, by the ConfigMap's full name."""
    return {
        o["metadata"]["name"]: parse_deployment(
            yaml.safe_load(o["data"]["deployment.yaml"]), Path("/etc/vllm-compress/deployment.yaml")
        )
        for (kind, _), o in objects.items()
        if kind == "ConfigMap"
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_services_labels_and_deployment_files_agree(name: str) -> None:
    objects = overlay(name)
    route = read_route(objects["HTTPRoute", "chat"])
    files = deployments(objects)
    servers = {
        template["metadata"]["labels"][INSTANCE]: (manifest, template)
        for manifest in objects.values()
        for container, template in templates(manifest).items()
        if container == "server"
    }
    assert set(servers) == {v.deployment for v in route.variants}
    for variant in route.variants:
        manifest, template = servers[variant.deployment]
        (config,) = [
            v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v
        ]
        deployment = files[config]
        assert (deployment.name, deployment.variant) == (variant.deployment, variant.name)
        assert deployment.service == route.service
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert variant.address == f"{variant.deployment}:{ports['http']}"
        assert deployment.vllm["port"] == ports["http"]
        service = objects["Service", variant.deployment]["spec"]
        selected = dict(service["selector"])
        selected.pop("leaderworkerset.sigs.k8s.io/worker-index", None)
        assert selected.items() <= template["metadata"]["labels"].items()
        assert template["metadata"]["labels"][NAME] == "vllm-compress", "Prometheus looks for it"
        size = manifest["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        assert gpus(template) * size == (0 if name == "cpu" else deployment.device.count)


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_wait_for_the_model_and_requests_are_finished(name: str) -> None:
    objects = overlay(name)
    files = deployments(objects)
    for manifest in objects.values():
        template = templates(manifest).get("server")
        if template is None:
            continue
        (container,) = template["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
        (config,) = [
            v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v
        ]
        finishing = files[config].vllm["shutdown-timeout"]
        assert template["spec"]["terminationGracePeriodSeconds"] > finishing + 10


def test_a_group_of_machines_has_one_service_and_meets_at_one_address() -> None:
    objects = overlay("multi-node")
    (group,) = [o for (kind, _), o in objects.items() if kind == "LeaderWorkerSet"]
    assert ("Service", group["metadata"]["name"]) not in objects, "the controller makes it"
    assert ("Deployment", "chat-full") not in objects
    selector = objects["Service", "chat-full"]["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    pods = templates(group)
    assert pods["worker"]["spec"]["containers"][0].get("ports") is None, "nothing to scrape"
    images = {pod["spec"]["containers"][0]["image"] for pod in pods.values()}
    assert images == {"vllm-compress:gpu"}
    shell = {name: pod["spec"]["containers"][0]["args"][0] for name, pod in pods.items()}
    for text in shell.values():
        subprocess.run(["sh", "-n", "-c", text], check=True)
    assert "--port=6379" in shell["server"]
    assert "$LWS_LEADER_ADDRESS:6379" in shell["worker"]


def test_gateway_and_rollout_need_neither_torch_nor_vllm(tmp_path: Path) -> None:
    """As in the gateway's image, which has Python, PyYAML, httpx and Prometheus' client."""
    absent = ["torch", "numpy", "scipy", "psutil", "vllm", "transformers", "safetensors"]
    absent += ["pydantic", "matplotlib"]
    files = [f"--config={COMPOSE}/deployments/{name}.yaml" for name in ("full", "int4")]
    arguments = ["gateway", *files, "--address=int4=int4:8000", f"--output={tmp_path}"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "from vllm_compress.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"assert main(['rollout', '--gateway', {str(tmp_path)!r}, '--to', '0%']) == 2\n"
        "from vllm_compress.operations.gateway import metrics, watch\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "/split: no answer" in done.stderr


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_writes_where_it_should_not(name: str) -> None:
    """Nor as root, nor with privileges; replicas are spread over machines."""
    for manifest in overlay(name).values():
        for template in templates(manifest).values():
            (container,) = template["spec"]["containers"]
            own, whole = container["securityContext"], template["spec"]["securityContext"]
            assert own["readOnlyRootFilesystem"] is True
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert whole["runAsNonRoot"] is True
            written = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert written == {"/dev/shm", "/home/vllm", "/tmp"}
            if manifest["kind"] == "Deployment":
                (spread,) = template["spec"]["topologySpreadConstraints"]
                selected = spread["labelSelector"]["matchLabels"]
                assert selected.items() <= template["metadata"]["labels"].items()
                assert INSTANCE in selected, "each variant on its own"


def test_policies_and_scalers_are_for_pods_there_are(tmp_path: Path) -> None:
    policy = with_component("policy", tmp_path / "policy")
    scaled = with_component("autoscaling", tmp_path / "scaled")
    labels = [t["metadata"]["labels"] for m in policy for t in templates(m).values()]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for manifest in (*policy, *scaled):
        kinds.setdefault(manifest["kind"], []).append(manifest.get("spec", {}))
    budgets = [spec["selector"]["matchLabels"] for spec in kinds["PodDisruptionBudget"]]
    assert {one[INSTANCE] for one in budgets} == {one[INSTANCE] for one in labels}
    (network,) = kinds["NetworkPolicy"]
    assert all(network["podSelector"]["matchLabels"].items() <= one.items() for one in labels)
    assert network["policyTypes"] == ["Ingress", "Egress"]
    (scaler,) = kinds["HorizontalPodAutoscaler"]
    names = {m["metadata"]["name"] for m in scaled if m["kind"] == "Deployment"}
    assert scaler["scaleTargetRef"]["name"] in names
    (metric,) = (m["pods"]["metric"]["name"] for m in scaler["metrics"])
    assert metric in {field.metadata["name"] for field in fields(Series)}


def test_ignored_files_stay_out_of_the_build_context() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*", "everything is left out but what is named"
    assert any(fnmatch.fnmatch("plugin/a/__pycache__", line) for line in lines[1:])

"""Write a Helm chart of what kustomize makes, so that both say the same: python deploy/helm.py OUT

    python deploy/helm.py chart --overlay gpu
    helm install chat ./chart --set replicas.int4=2 \\
      --set images.server=registry.example/vllm-compress@sha256:...

Templates are the manifests of the overlay with the nginx gateway, policies and API keys, and, where
a value says so, of components that only add objects. What people change is a value; its default is
what kustomize has. One service to a namespace, as with kustomize. Needs kubectl and PyYAML.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).resolve().parent / "kubernetes"
ALWAYS = ("nginx-gateway", "policy", "api-keys")
# What each of them adds is there where `VALUE.enabled` is.
SWITCHED = {
    "autoscaling": "autoscaling",
    "keda": "keda",
    "quality": "quality",
    "prometheus-operator": "podMonitor",
}
SCALED = "or .Values.autoscaling.enabled .Values.keda.enabled"
VERSION = "0.1.0"
Object = dict[str, Any]


class Values:
    """Defaults by name, and what stands for each in a template."""

    def __init__(self) -> None:
        self.tree: Object = {}
        self.expressions: list[str] = []

    def put(self, name: str, default: Any, pipe: str = "toJson") -> str:
        """Note a value; what to write in its place."""
        *parents, last = name.split(".")
        place = self.tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place.setdefault(last, default)
        path = "".join(f' "{part}"' for part in name.split("."))
        self.expressions.append(f"{{{{ index .Values{path} | {pipe} }}}}")
        return self._placeholder()

    def unless_scaled(self, name: str, default: Any) -> str:
        """A value that is a scaler's to say where one is on."""
        self.put(name, default)
        self.expressions[-1] = (
            f"{{{{ if {SCALED} }}}}null{{{{ else }}}}{self.expressions[-1]}{{{{ end }}}}"
        )
        return self._placeholder()

    def _placeholder(self) -> str:
        return f"@value-{len(self.expressions) - 1}@"

    def text(self, objects: list[Object]) -> str:
        """Templates of these objects."""
        whole = yaml.safe_dump_all(objects, sort_keys=False, width=10_000)
        # Nobody else's braces are Helm's.
        whole = whole.replace("{{", '{{ "{{" }}')
        return re.sub(r"'?@value-(\d+)@'?", lambda m: self.expressions[int(m[1])], whole)


def kustomized(overlay: str, components: tuple[str, ...]) -> list[Object]:
    """The objects of an overlay with components, as kustomize makes them."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kubernetes"
        shutil.copytree(KUBERNETES, place)
        changed = place / "overlays" / overlay
        added = ", ".join(f"../../components/{name}" for name in components)
        with (changed / "kustomization.yaml").open("a") as file:
            file.write(f"components: [{added}]\n")
        done = subprocess.run(
            ["kubectl", "kustomize", str(changed)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"kubectl kustomize: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))


def with_values(made: Object, values: Values) -> Object:
    """An object with values in the place of what people change."""
    name, kind = made["metadata"]["name"], made["kind"]
    spec = made.get("spec", {})
    if kind == "ConfigMap" and "deployment.yaml" in made.get("data", {}):
        variant = _unhashed(name).removeprefix("deployment-")
        made["metadata"]["name"] = _unhashed(name)
        default = yaml.safe_load(made["data"]["deployment.yaml"])
        made["data"]["deployment.yaml"] = values.put(
            f"deployments.{variant}", default, "toJson | toJson"
        )
    elif kind == "PersistentVolumeClaim":
        request = spec["resources"]["requests"]
        request["storage"] = values.put("models.storage", request["storage"])
    elif kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for key in ("minReplicas", "maxReplicas", "minReplicaCount", "maxReplicaCount"):
            if key in spec:
                spec[key] = values.put(f"scaling.{key[:3]}", spec[key])
        for trigger in spec.get("triggers", []):
            address = trigger["metadata"]["serverAddress"]
            trigger["metadata"]["serverAddress"] = values.put("prometheus", address)
    elif kind == "CronJob":
        spec["schedule"] = values.put("quality.schedule", spec["schedule"])
        template = spec["jobTemplate"]["spec"]["template"]
        for variable in template["spec"]["containers"][0]["env"]:
            if variable["name"] == "PROBES":
                variable["value"] = values.put("quality.probes", variable["value"])
        _pod(template, "quality", values)
    elif kind == "Deployment":
        which = name.removeprefix("chat-")
        put = values.unless_scaled if which == "int4" else values.put
        spec["replicas"] = put(f"replicas.{which}", spec["replicas"])
        _pod(spec["template"], which, values)
    return made


def _pod(template: Object, which: str, values: Values) -> None:
    """Image, resources, and of servers where they may run and how long a model may load."""
    pod = template["spec"]
    (container,) = pod["containers"]
    image, _, tag = container["image"].partition(":")
    kind = "gateway" if which == "gateway" else "server"
    container["image"] = values.put(f"images.{kind}", f"{image}:{tag}")
    container["resources"] = values.put(f"resources.{which}", container["resources"])
    for volume in pod["volumes"]:
        if "configMap" in volume:
            volume["configMap"]["name"] = _unhashed(volume["configMap"]["name"])
    if container["name"] == "server":
        startup = container["startupProbe"]
        startup["failureThreshold"] = values.put(
            "models.loadTensOfSeconds", startup["failureThreshold"]
        )
        pod["nodeSelector"] = values.put(f"nodeSelector.{which}", {})
        pod["tolerations"] = values.put("tolerations", pod.get("tolerations", []))
        # A changed deployment file is new pods, as with kustomize's hashed names.
        template["metadata"].setdefault("annotations", {})["checksum/deployment"] = values.put(
            f"deployments.{which}", {}, "toJson | sha256sum"
        )


def _unhashed(name: str) -> str:
    return re.sub(r"-[a-z0-9]{10}$", "", name)


def write_chart(out: Path, overlay: str) -> None:
    """Chart.yaml, values.yaml and templates."""
    values, templates = Values(), out / "templates"
    templates.mkdir(parents=True, exist_ok=True)
    base = kustomized(overlay, ALWAYS)
    there = {(made["kind"], made["metadata"]["name"]) for made in base}
    texts = {"service": values.text([with_values(made, values) for made in base])}
    for component, switch in SWITCHED.items():
        more = [
            with_values(made, values)
            for made in kustomized(overlay, (*ALWAYS, component))
            if (made["kind"], made["metadata"]["name"]) not in there
        ]
        values.put(f"{switch}.enabled", False)
        texts[component] = (
            f"{{{{- if .Values.{switch}.enabled }}}}\n{values.text(more)}{{{{- end }}}}\n"
        )
    for name, text in texts.items():
        (templates / f"{name}.yaml").write_text(text)
    chart = {
        "apiVersion": "v2",
        "name": "vllm-compress",
        "description": f"Variants of a service behind a gateway; made of the overlay {overlay}.",
        "type": "application",
        "version": VERSION,
    }
    (out / "Chart.yaml").write_text(yaml.safe_dump(chart, sort_keys=False))
    (out / "values.yaml").write_text(
        "# Made by deploy/helm.py; the Secret chat-keys has to be there, see api-keys.\n"
        + yaml.safe_dump(json.loads(json.dumps(values.tree)), sort_keys=False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the chart")
    parser.add_argument("--overlay", default="gpu", help="of deploy/kubernetes/overlays: cpu, gpu")
    arguments = parser.parse_args()
    if arguments.overlay not in ("cpu", "gpu", "multi-gpu"):
        sys.exit(f"--overlay is {arguments.overlay!r}, expected cpu, gpu or multi-gpu")
    write_chart(arguments.out, arguments.overlay)


if __name__ == "__main__":
    main()

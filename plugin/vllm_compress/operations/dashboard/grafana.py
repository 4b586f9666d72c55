"""The panels as a Grafana dashboard: the JSON that `deploy/grafana/vllm-compress.json` holds.

For Grafana 9.5 and later (schema 38). Two halves: every chosen deployment, and A against B, whose
defaults are the first and the last deployment of the service by name.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_compress.operations.dashboard.declaration import Panel, Query, Unit
from vllm_compress.operations.dashboard.operation import SHARE, STARTS
from vllm_compress.operations.dashboard.panels import (
    ALERTS,
    FACTS,
    INFO,
    headlines,
    panels,
)

UID = "vllm-compress"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # columns of Grafana's grid
UNITS: dict[Unit, str] = {
    "count": "short",
    "number": "short",
    "bytes": "decbytes",
    "seconds": "s",
    "ratio": "percentunit",
    "requests/s": "reqps",
    "tokens/s": "suffix: tokens/s",
    "watts": "watt",
    "joules": "joule",
    "money": "short",
}
DASHES = {"dashed": [8, 6], "dotted": [2, 6]}
CHOSEN = '=~"$deployment"'
PAIR = {name: f'="${name}"' for name in ("a", "b")}
COLORS = {"a": "blue", "b": "orange"}
CHANGE = "B against A"


def dashboard_text() -> str:
    """The file, as it is committed."""
    return json.dumps(dashboard(), indent=2) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports or provisions it."""
    layout = _Layout()
    layout.row("Overview")
    layout.add(_alerts(), WIDTH, 5)
    layout.add(_deployments(), WIDTH, 8)
    for panel in panels():
        layout.add(_chart(panel, [(CHOSEN, "{{deployment}}")]), WIDTH // 3, 8)
    layout.row("A against B: $a against $b")
    for query, unit in _columns():
        layout.add(_comparison(query, unit), WIDTH // 6, 5)
    both = [(selector, f"{name.upper()} {{{{deployment}}}}") for name, selector in PAIR.items()]
    for panel in panels():
        layout.add(_chart(panel, both, paired=True), WIDTH // 3, 8)
    return {
        "uid": UID,
        "title": "vllm-compress",
        "description": "Deployments of vllm-compress, and one against another.",
        "tags": ["vllm"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": _annotations()},
        "panels": layout.panels,
    }


class _Layout:
    """Panels from left to right and top to bottom."""

    def __init__(self) -> None:
        self.panels: list[dict[str, Any]] = []
        self._x = self._y = self._below = 0

    def row(self, title: str) -> None:
        self._x = WIDTH
        row = {"type": "row", "title": title, "collapsed": False, "panels": []}
        self.add(row, WIDTH, 1)

    def add(self, panel: dict[str, Any], width: int, height: int) -> None:
        if self._x + width > WIDTH:
            self._x, self._y = 0, self._below
        place = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, **panel, "gridPos": place})
        self._x += width
        self._below = max(self._below, self._y + height)


def _variables() -> list[dict[str, Any]]:
    def names(name: str, label: str, query: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,  # when the time range changes
            "sort": 1,
            **more,
        }

    # The value of "all" is one that deployments without a service match, too.
    all_of_them = {"includeAll": True, "multi": True, "allValue": ".*"}
    deployment = f'label_values({INFO}{{service=~"$service"}}, deployment)'
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        names("service", "Service", f"label_values({INFO}, service)", **all_of_them, current=_ALL),
        names("deployment", "Deployments", deployment, **all_of_them, current=_ALL),
        names("a", "A", deployment),
        names("b", "B", deployment, sort=2),
    ]


_ALL = {"text": "All", "value": "$__all"}


def _annotations() -> list[dict[str, Any]]:
    """Vertical lines: alerts, rollouts and starts."""

    def lines(name: str, color: str, expression: str, text: str) -> dict[str, Any]:
        return {
            "name": name,
            "datasource": DATASOURCE,
            "enable": True,
            "iconColor": color,
            "expr": expression,
            "titleFormat": name if text else "{{alertname}}",
            "textFormat": text or "{{deployment}} {{objective}}",
        }

    rollout = f"changes({SHARE}{{deployment{CHOSEN}}}[$__interval]) > 0"
    start = f"{STARTS}{{deployment{CHOSEN}}} > 0"
    return [
        lines("Alerts", "red", ALERTS, ""),
        lines("Rollouts", "purple", rollout, "{{deployment}}"),
        lines("Starts", "gray", start, "{{deployment}}"),
    ]


def _target(expression: str, ref: str, **more: Any) -> dict[str, Any]:
    return {"datasource": DATASOURCE, "refId": ref, "expr": expression, **more}


def _ref(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return (chr(64 + index // 26) if index >= 26 else "") + chr(65 + index % 26)


def _override(kind: str, pattern: str, **properties: Any) -> dict[str, Any]:
    return {
        "matcher": {"id": kind, "options": pattern},
        "properties": [
            {"id": name.replace("__", "."), "value": value} for name, value in properties.items()
        ],
    }


def _fixed(name: str) -> dict[str, str]:
    return {"mode": "fixed", "fixedColor": COLORS[name]}


def _chart(panel: Panel, sets: list[tuple[str, str]], *, paired: bool = False) -> dict[str, Any]:
    """A time series; each of `sets` is a selector of deployments and how its lines are called."""
    targets: list[dict[str, Any]] = []
    overrides: list[dict[str, Any]] = []
    for selector, who in sets:
        for query in panel.queries:
            ref = _ref(len(targets))
            legend = f"{who} {query.legend}".strip()
            targets.append(_target(query.expression(selector), ref, legendFormat=legend))
            if query.style in DASHES:
                line = {"fill": "dash" if query.style == "dashed" else "dot"}
                style = {**line, "dash": DASHES[query.style]}
                overrides.append(_override("byFrameRefID", ref, custom__lineStyle=style))
    if paired:
        for name in COLORS:
            overrides.append(_override("byRegexp", f"/^{name.upper()} /", color=_fixed(name)))
    limits: dict[str, Any] = {} if panel.wide or panel.unit == "number" else {"min": 0}
    limits |= {} if panel.top is None else {"max": panel.top}
    scale = {"scaleDistribution": {"type": "log", "log": 10}} if panel.wide else {}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help + (f" Needs {panel.needs}." if panel.needs else ""),
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {
            "defaults": {
                "unit": UNITS[panel.unit],
                **limits,
                "custom": {"lineWidth": 2, "fillOpacity": 0, "showPoints": "never", **scale},
            },
            "overrides": overrides,
        },
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _table(
    title: str, targets: list[dict[str, Any]], transform: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    asked = [{**target, "instant": True, "range": False, "format": "table"} for target in targets]
    return {
        "type": "table",
        "title": title,
        "datasource": DATASOURCE,
        "targets": asked,
        "transformations": transform,
        "fieldConfig": {"defaults": {}, "overrides": []},
        **more,
    }


def _organize(hidden: list[str], names: dict[str, str]) -> dict[str, Any]:
    options = {"excludeByName": dict.fromkeys(hidden, True), "renameByName": names}
    return {"id": "organize", "options": options}


def _alerts() -> dict[str, Any]:
    hidden = ["Time", "Value", "__name__", "alertstate", "job", "instance"]
    return _table("Alerts that fire", [_target(ALERTS, "A")], [_organize(hidden, {})])


def _columns() -> list[tuple[Query, Unit]]:
    return [*FACTS, *((query, panel.unit) for query, panel in headlines())]


def _deployments() -> dict[str, Any]:
    """One row per deployment: what it is, and every headline now."""
    shown = "deployment, service, variant, formats, bits_per_weight, sparsity, device_type"
    targets = [_target(f"max by ({shown}) ({INFO}{{deployment{CHOSEN}}})", "A")]
    names = {"bits_per_weight": "bits per weight", "device_type": "device"}
    overrides = []
    for index, (query, unit) in enumerate(_columns(), start=1):
        ref = _ref(index)
        expression = f"max by (deployment) ({query.expression(CHOSEN)})"
        targets.append(_target(expression, ref))
        names[f"Value #{ref}"] = query.headline
        overrides.append(_override("byName", query.headline, unit=UNITS[unit], decimals=2))
    join = {"id": "joinByField", "options": {"byField": "deployment", "mode": "outer"}}
    hidden = ["Value #A", *(f"Time {i}" for i in range(1, len(targets) + 1)), "Time"]
    return _table(
        "Deployments",
        targets,
        [join, _organize(hidden, names)],
        fieldConfig={"defaults": {}, "overrides": overrides},
    )


def _comparison(query: Query, unit: Unit) -> dict[str, Any]:
    """Means of A and B over the time shown, and B relative to A."""
    a, b = (f"max(avg_over_time({query.expression(PAIR[name])}[$__range]))" for name in COLORS)
    named = {"A": a, "B": b, CHANGE: f"{b} / {a} - 1"}
    targets = [
        _target(expression, _ref(i), legendFormat=name, instant=True, range=False)
        for i, (name, expression) in enumerate(named.items())
    ]
    return {
        "type": "stat",
        "title": query.headline,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": UNITS[unit]},
            "overrides": [
                *(_override("byName", name.upper(), color=_fixed(name)) for name in COLORS),
                _override("byName", CHANGE, unit="percentunit", color={"mode": "fixed"}),
            ],
        },
        "options": {"textMode": "value_and_name", "graphMode": "none", "orientation": "horizontal"},
    }

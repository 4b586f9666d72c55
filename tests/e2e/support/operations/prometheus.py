"""The real Prometheus as a subprocess, for tests.

    config = scrape_config({"a": server.port}, rules=[RULES], interval=1)
    with Prometheus(config) as prometheus:
        prometheus.wait_for("vllm_compress_devices", series=2)

Listens on a free port of 127.0.0.1 and keeps its data in a folder that goes when it stops. Skips
the test where Prometheus is not installed; fails with its log when it does not become ready.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml

from tests.e2e.support.ready import wait_until_ready
from tests.e2e.support.server import free_port

START_SECONDS = 30.0


def tool(name: str) -> str:
    """Path of an installed program; skips the test where there is none."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"needs {name} (`make tools`)")
    return path


def scrape_config(
    targets: Mapping[str, int], rules: Iterable[str | Path] = (), interval: float = 1
) -> str:
    """A configuration that scrapes `targets` (job to local port) every `interval` seconds.

    Rules are evaluated as often as targets are scraped; their groups must not name an interval.
    """
    every = f"{round(interval * 1000)}ms"
    return yaml.safe_dump(
        {
            "global": {
                "scrape_interval": every,
                "scrape_timeout": every,
                "evaluation_interval": every,
            },
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in targets.items()
            ],
        }
    )


class Prometheus:
    """Starts on entering the `with` block, stops on leaving it. `config` is the text of
    prometheus.yml, or its path, which its own paths are relative to; `port` is chosen unless
    given; `data` is a folder of earlier data."""

    def __init__(
        self, config: str | Path, *args: str, port: int | None = None, data: Path | None = None
    ) -> None:
        self.program = tool("prometheus")
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = config
        self._data = data
        self._args = args
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        self._folder = Path(tempfile.mkdtemp(prefix="prometheus-"))
        self._log = self._folder / "log"
        config = self.config
        if isinstance(config, str):
            config = self._folder / "prometheus.yml"
            config.write_text(str(self.config), encoding="utf-8")
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    self.program,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self._data or self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--web.enable-lifecycle",
                    *self._args,
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def log(self) -> str:
        """Everything Prometheus has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def api(self, path: str, **parameters: str | float) -> Any:
        """`data` of an answer of /api/v1; fails with Prometheus' own words."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as problem:
            raise AssertionError(f"{path} {parameters}: {problem.read().decode()}") from problem

    def reload(self) -> None:
        """Read configuration and rules again."""
        urllib.request.urlopen(f"{self.url}/-/reload", data=b"", timeout=30).close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: labels and value of every series."""
        data = self.api("query", query=expression)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(row["metric"], float(row["value"][1])) for row in data["result"]]

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """A range query: `metric` and `values` of every series."""
        found: list[dict[str, Any]] = self.api(
            "query_range", query=expression, start=start, end=end, step=step
        )["result"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that are pending or firing."""
        found: list[dict[str, Any]] = self.api("alerts")["alerts"]
        return found

    def wait_for(
        self, expression: str, series: int = 1, seconds: float = 60
    ) -> list[tuple[dict[str, str], float]]:
        """Query until at least `series` series come back."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.query(expression)
            if len(found) >= series:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"{expression}: {len(found)} series after {seconds:.0f} s")
            time.sleep(0.3)

    def _wait(self) -> None:
        assert self._process is not None

        def ready() -> None:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()

        wait_until_ready(self._process, "Prometheus", ready, lambda: self.log, START_SECONDS)

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

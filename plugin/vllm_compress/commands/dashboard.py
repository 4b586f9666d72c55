"""`vllm-compress dashboard`: throughput, latency, load, errors and cost of every deployment.

Draws what the recording rules of `deploy/prometheus/` make of the servers' series. Grafana draws
the same panels from `deploy/grafana/vllm-compress.json`, which `--grafana` prints.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, OutputError
from compress_methods.system.files import write_text
from vllm_compress.operations.dashboard.collect import collect
from vllm_compress.operations.dashboard.grafana import dashboard_text
from vllm_compress.operations.dashboard.page import render, serve
from vllm_compress.operations.prometheus import Prometheus

DESCRIPTION = "Draw the metrics of all deployments, and of one against another, from Prometheus."
EPILOG = """\
examples:
  vllm-compress dashboard --prometheus http://localhost:9090
                                      serves the page at http://localhost:8090
  vllm-compress dashboard --prometheus http://localhost:9090 --range 6h -o today.html
                                      one file to keep or send, nothing else needed to view it
  vllm-compress dashboard --grafana -o vllm-compress.json
                                      the same panels as a Grafana dashboard

Prometheus must load the rules in deploy/prometheus/rules. Links keep what was chosen:
http://localhost:8090/#view=ab&a=chat-full&b=chat-int4
"""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("dashboard", description=DESCRIPTION, epilog=EPILOG)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prometheus", metavar="URL", help="where Prometheus is")
    what.add_argument("--grafana", action="store_true", help="print Grafana's JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write a file instead of serving")
    parser.add_argument(
        "--range", default="1h", metavar="TIME", help="time in FILE: 30m, 6h, 7d (default 1h)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s)")
    parser.add_argument("--port", type=int, default=8090, help="port to serve at (%(default)s)")


def run(args: argparse.Namespace) -> int:
    seconds = duration(args.range)
    if args.grafana:
        _put(args.output, dashboard_text())
        return 0
    prometheus = Prometheus(args.prometheus)
    if args.output:
        data = collect(prometheus, seconds)
        if data["problem"]:
            raise CompressError(f"nothing to draw: {data['problem']}")
        _put(args.output, render(data))
        return 0
    prometheus.query("1")  # wrong addresses are said here, not on the page
    with serve(prometheus, args.host, args.port) as server:
        host = "localhost" if args.host in ("127.0.0.1", "0.0.0.0") else args.host
        print(f"http://{host}:{server.server_address[1]}/", flush=True)
        server.serve_forever()
    return 0


def duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `6h` or `7d`."""
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if not found or not int(found[1]):
        raise CompressError(f"--range is {text!r}, expected a time such as 30m, 6h or 7d")
    return float(int(found[1]) * SECONDS[found[2]])


def _put(path: str | None, text: str) -> None:
    if path is None:
        sys.stdout.write(text)
        return
    try:
        write_text(Path(path), text)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written: {problem.strerror}") from problem

"""GET of JSON from a gateway; every failure is one line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from vllm_compress.gateway.split import GatewayError

TIMEOUT = 10.0


def get_json(url: str) -> Any:
    """The body of `url`."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as problem:
        raise GatewayError(f"{url}: answered HTTP {problem.code}") from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        raise GatewayError(f"{url}: no answer ({reason})") from problem

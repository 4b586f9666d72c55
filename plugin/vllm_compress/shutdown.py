"""Requests that come while a deployment's engine shuts down: an error, which a gateway may retry.

On SIGTERM vLLM 0.32's engine finishes what it has and rejects what comes, for as long as the API
server still takes requests. It rejects by an output that says `abort`, which the API server answers
as 200 with no text: a request lost without a word. An output that says `error` it answers as 500,
and the gateway asks another server.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from vllm_compress.names import DEPLOYMENT_VARIABLE

ENGINE = "vllm.v1.engine.core"
REJECT, ERROR = "_reject_add_in_shutdown", "_send_error_outputs_to_client"


def reject_by_error() -> None:
    """Have the engine of a deployment reject by an error; nothing in other processes, nor in a vLLM
    whose engine has other methods."""
    module: Any = sys.modules.get(ENGINE)  # an engine's process has loaded it before its plugins
    if module is None or DEPLOYMENT_VARIABLE not in os.environ:
        return
    engine = getattr(module, "EngineCoreProc", None)
    state = getattr(module, "EngineShutdownState", None)
    if state is None or not all(hasattr(engine, name) for name in (REJECT, ERROR)):
        return

    @functools.wraps(getattr(engine, REJECT))
    def reject(self: Any, request: Any) -> bool:
        if self.shutdown_state == state.RUNNING:
            return False
        getattr(self, ERROR)([request.request_id], request.client_index)
        return True

    setattr(engine, REJECT, reject)

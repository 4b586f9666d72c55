"""Conversions in processes of their own, to be killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from compress_methods import convert

# Processes that have imported what a conversion needs, so that starting one takes no time.
READY = multiprocessing.get_context("forkserver")
READY.set_forkserver_preload(
    [
        "compress_methods.search.prune_to",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


def start(model: Path, recipe: Path, out: Path, text: Path) -> ForkServerProcess:
    process = READY.Process(
        target=convert, args=(model, recipe, out), kwargs={"calibration": text, "quiet": True}
    )
    process.start()
    return process


def finish(process: ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode

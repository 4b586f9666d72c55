"""Making a running nginx follow a new split, without losing a request.

The new split.conf is tested by nginx first, then renamed over the old one, then nginx gets HUP: new
workers start with it, and the old ones accept nothing more and finish what they have, however long
that streams. It counts as done when the gateway itself says so and each old worker is in its end
(nginx tells them a tenth of a second later); otherwise the old file comes back.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress_methods.lazy import httpx
from compress_methods.system.files import write_text
from compress_methods.system.http import TIMEOUT, fetch
from compress_methods.system.lock import DirectoryLock
from vllm_compress.operations.gateway.nginx import (
    CONFIG_FILE,
    SPLIT_FILE,
    gateway_url,
    read_traffic_split,
    render_traffic_split,
)
from vllm_compress.operations.gateway.servers import SERVERS_FILE
from vllm_compress.operations.gateway.traffic_split import GatewayError, TrafficSplit

PATIENCE = 20.0
# While workers change places either may answer; this often in a row, the new ones alone do.
SAME_ANSWERS = 5
PID_FILE = "nginx.pid"
ENDING = "worker process is shutting down"


def find_nginx() -> str:
    """Path of the nginx program."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise GatewayError("nginx is not installed (Debian, Ubuntu: apt install nginx-light)")
    return path


def nginx_is_here() -> bool:
    """Tell whether nginx is installed."""
    try:
        return bool(find_nginx())
    except GatewayError:
        return False


def _refusal(folder: Path, config: str) -> str:
    """What nginx has against a configuration; empty where nothing. Whether it may listen there is
    another machine's matter, or a moment's."""
    command = [find_nginx(), "-t", "-q", "-p", str(folder), "-c", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    grave = [line for line in said if "bind() to" not in line]
    return grave[0] if done.returncode and grave else ""


def check_files(write: Callable[[Path], None]) -> None:
    """Have nginx read what `write` writes into a folder, in another one that is gone afterwards."""
    with TemporaryDirectory() as place:
        write(Path(place))
        said = _refusal(Path(place), CONFIG_FILE)
    if said:
        raise GatewayError(f"nginx refuses the configuration: {said}")


def run_nginx(
    folder: Path, beside: Callable[[], AbstractContextManager[Callable[[], None]]]
) -> int:
    """Run nginx until it ends; its exit code. `beside` is what runs as long as it does; it gives
    what to call before nginx is asked to end, so as to reload it no more: that would revive it.

    nginx cuts streams off on SIGTERM, the signal that service managers send, and finishes them on
    SIGQUIT. So TERM and INT ask it to finish, and the second of them to end.
    """
    asked = 0
    process: subprocess.Popen[bytes]
    quiet: Callable[[], None]

    def stop(signum: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        quiet()
        process.send_signal(signal.SIGQUIT if asked == 1 else signal.SIGTERM)

    with beside() as quiet:  # which listens before nginx tells of a request
        process = subprocess.Popen([find_nginx(), "-p", str(folder), "-c", CONFIG_FILE])
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ask(url: str) -> Any:
    """What the gateway on this machine says; its certificate is for another name than 127.0.0.1."""
    if url.startswith("http:"):
        return fetch(url).json()
    with httpx.Client(verify=False, timeout=TIMEOUT) as client:
        return fetch(url, client=client).json()


@dataclass(frozen=True)
class NginxGateway:
    """The gateway of a folder that `vllm-compress gateway` wrote."""

    folder: Path

    def live(self) -> TrafficSplit:
        """The split that the running workers have."""
        url = f"{gateway_url(self.folder)}/split"
        try:
            return TrafficSplit.from_dict(_ask(url), url)
        except ValueError as problem:
            raise GatewayError(f"{url}: not the split of a vllm-compress gateway") from problem

    def stored(self) -> TrafficSplit:
        """The split of the folder's files, which say where the variants are."""
        return read_traffic_split(self.folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One rollout at a time."""
        read_traffic_split(self.folder)
        try:
            lock = DirectoryLock(self.folder)
        except BlockingIOError as problem:
            raise GatewayError(f"{self.folder}: another rollout is at work") from problem
        except OSError as problem:
            raise GatewayError(f"{self.folder}: {problem.strerror}") from problem
        with closing(lock):
            yield

    def check(self, split: TrafficSplit) -> None:
        """Have nginx read the configuration with this split; nothing changes."""
        candidate, trial = self.folder / f"next-{SPLIT_FILE}", self.folder / f"next-{CONFIG_FILE}"
        try:
            write_text(candidate, render_traffic_split(split))
            text = (self.folder / CONFIG_FILE).read_text(encoding="utf-8")
            if f"include {SERVERS_FILE};" not in text:
                raise GatewayError(
                    f"{self.folder}: of an older vllm-compress; write it again with "
                    "`vllm-compress gateway`, which keeps the split"
                )
            write_text(trial, text.replace(f"include {SPLIT_FILE};", f"include {candidate.name};"))
            said = _refusal(self.folder, trial.name)
        except OSError as problem:
            raise GatewayError(
                f"{self.folder}: cannot be written ({problem.strerror})"
            ) from problem
        finally:
            candidate.unlink(missing_ok=True)
            trial.unlink(missing_ok=True)
        if said:
            raise GatewayError(f"nginx refuses the new split: {said}")

    def apply(self, split: TrafficSplit) -> float:
        """Change over; the seconds until only the new split answered."""
        before = read_traffic_split(self.folder)
        begin = time.monotonic()
        write_text(self.folder / SPLIT_FILE, render_traffic_split(split))
        try:
            old = self._accepting()
            self.reload()
            self._wait(split, old, begin + PATIENCE)
        except BaseException:
            write_text(self.folder / SPLIT_FILE, render_traffic_split(before))
            self.reload()
            raise
        return time.monotonic() - begin

    def reload(self) -> None:
        """Have nginx read its files again; it keeps what it has where they are not right."""
        try:
            os.kill(self._master(), signal.SIGHUP)
        except OSError as problem:
            raise self._elsewhere(problem) from problem

    def _master(self) -> int:
        try:
            return int((self.folder / PID_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise self._elsewhere(problem) from problem

    def _elsewhere(self, problem: Exception) -> GatewayError:
        return GatewayError(
            f"{self.folder / PID_FILE}: cannot reload nginx ({problem}); run this where nginx runs"
        )

    def _accepting(self) -> set[str]:
        """Process numbers of the workers that have not been told to end, as Linux has them."""
        master, found = self._master(), set()
        with suppress(OSError):  # no Linux
            for worker in Path(f"/proc/{master}/task/{master}/children").read_text().split():
                with suppress(OSError):  # it has ended meanwhile
                    if ENDING not in Path(f"/proc/{worker}/cmdline").read_text(errors="replace"):
                        found.add(worker)
        return found

    def _wait(self, split: TrafficSplit, old: set[str], deadline: float) -> None:
        same = 0
        while same < SAME_ANSWERS or old & self._accepting():
            if time.monotonic() > deadline:
                raise GatewayError(
                    f"{self.folder}: nginx did not take over {split} within "
                    f"{PATIENCE:.0f} s, so the old split is back; its log says why"
                )
            same = same + 1 if self.live() == split else 0
            time.sleep(0.02)

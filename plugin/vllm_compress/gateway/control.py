"""Making a running nginx follow a new split, without losing a request.

The new split.conf is tested by nginx first, then renamed over the old one, then nginx gets HUP: new
workers start with it, and the old ones accept nothing more and finish what they have, however long
that streams. It counts as done when the gateway itself says so; otherwise the old file comes back.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress_methods.files import write_text
from vllm_compress.gateway.ask import get_json
from vllm_compress.gateway.nginx import CONFIG, SPLIT, gateway_url, read_split, render_split
from vllm_compress.gateway.split import GatewayError, Split, from_dict

PATIENCE = 20.0
# While workers change places either may answer; this often in a row, the new ones alone do.
SAME_ANSWERS = 5


def find_nginx() -> str:
    """Path of the nginx program."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise GatewayError("nginx is not installed (Debian, Ubuntu: apt install nginx-light)")
    return path


@dataclass(frozen=True)
class Nginx:
    """The gateway of a folder that `vllm-compress gateway` wrote."""

    folder: Path

    def live(self) -> Split:
        """The split that the running workers have."""
        url = f"{gateway_url(self.folder)}/split"
        return from_dict(get_json(url), url)

    def stored(self) -> Split:
        """The split of the folder's files, which say where the variants are."""
        return read_split(self.folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One rollout at a time."""
        read_split(self.folder)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as problem:
            raise GatewayError(f"{self.folder}: another rollout is at work") from problem
        finally:
            os.close(descriptor)

    def check(self, split: Split) -> None:
        """Have nginx read the configuration with this split; nothing changes."""
        candidate, trial = self.folder / f"next-{SPLIT}", self.folder / f"next-{CONFIG}"
        try:
            write_text(candidate, render_split(split))
            text = (self.folder / CONFIG).read_text(encoding="utf-8")
            write_text(trial, text.replace(f"include {SPLIT};", f"include {candidate.name};"))
            command = [find_nginx(), "-t", "-q", "-p", str(self.folder), "-c", trial.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError as problem:
            raise GatewayError(
                f"{self.folder}: cannot be written ({problem.strerror})"
            ) from problem
        finally:
            candidate.unlink(missing_ok=True)
            trial.unlink(missing_ok=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise GatewayError(f"nginx refuses the new split: {said[0]}")

    def apply(self, split: Split) -> float:
        """Change over; the seconds until only the new split answered."""
        before = read_split(self.folder)
        begin = time.monotonic()
        write_text(self.folder / SPLIT, render_split(split))
        try:
            self._reload()
            self._wait(split, begin + PATIENCE)
        except BaseException:
            write_text(self.folder / SPLIT, render_split(before))
            self._reload()
            raise
        return time.monotonic() - begin

    def _reload(self) -> None:
        path = self.folder / "nginx.pid"
        try:
            os.kill(int(path.read_text(encoding="utf-8")), signal.SIGHUP)
        except (OSError, ValueError) as problem:
            raise GatewayError(
                f"{path}: cannot reload nginx ({problem}); run this where nginx runs"
            ) from problem

    def _wait(self, split: Split, deadline: float) -> None:
        same = 0
        while same < SAME_ANSWERS:
            if time.monotonic() > deadline:
                raise GatewayError(
                    f"{self.folder}: nginx did not take over {split.describe()} within "
                    f"{PATIENCE:.0f} s, so the old split is back; its log says why"
                )
            same = same + 1 if self.live() == split else 0
            time.sleep(0.02)

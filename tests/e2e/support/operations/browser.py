"""Chromium without a window, for tests of pages: what a page became, and its picture.

Skips the test where Chromium is not installed. Time is virtual: a page's timers and requests are
awaited, then the result is taken, whatever the machine's speed.
"""

from __future__ import annotations

import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from tests.e2e.support.operations.prometheus import Prometheus, tool
from vllm_compress.operations.dashboard.declaration import Panel, Query

PATIENCE_MS = 4000
COLORS = {"full": (0x25, 0x63, 0xEB), "int4": (0xE8, 0x59, 0x0C)}


def _chromium(url: str, *flags: str, size: tuple[int, int]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        done = subprocess.run(
            [
                tool("chromium"),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                f"--user-data-dir={profile}",
                f"--window-size={size[0]},{size[1]}",
                f"--virtual-time-budget={PATIENCE_MS}",
                *flags,
                url,
            ],
            capture_output=True,
            timeout=90,
            check=True,
        )
    return done.stdout


def page_after_scripts(url: str, picture: Path | None = None) -> str:
    """The page's HTML once its scripts have run, and a PNG of it where `picture` says."""
    flags = ["--dump-dom"] if picture is None else ["--dump-dom", f"--screenshot={picture}"]
    return _chromium(url, *flags, size=(1500, 2600)).decode()


class Drawn(HTMLParser):
    """The dashboard's panels: title to the `d` of every line drawn, and all text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.panels: dict[str, list[str]] = {}
        self.text = ""
        self._title: str | None = None
        self._in_title = self._quiet = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._quiet = tag in ("script", "style")
        if tag == "h3":
            self._in_title = True
        elif tag == "text":
            self.text += " "
        elif tag == "path" and self._title and values.get("style", "") != "":
            self.panels[self._title].append(values.get("d") or "")

    def handle_endtag(self, tag: str) -> None:
        self._quiet = False
        self._in_title = self._in_title and tag != "h3"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title = data
            self.panels[data] = []
        if not self._quiet:
            self.text += f"{data} "


def assert_colored(picture: Path) -> None:
    """Both deployments' colours are drawn, and the page is not one plain surface."""
    import matplotlib.image
    import numpy as np

    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, picture
    for name, color in COLORS.items():
        near = (np.abs(pixels - np.array(color)).max(axis=-1) < 12).sum()
        assert near > 2000, (picture, name, near)


def shown(prometheus: Prometheus, query: Query) -> int:
    """Lines at least: of both variants, or of those to which a reason or objective happened."""
    if "{{" not in query.legend:
        return len(COLORS)
    found = prometheus.query(f"max_over_time({query.series}[3m]) > 0")
    return len({labels["deployment"] for labels, _ in found})


def too_few(prometheus: Prometheus, seen: Drawn, panel: Panel) -> bool:
    """Whether a panel lacks lines of three points and more."""
    lines = [d for d in seen.panels[panel.title] if d.count("L") >= 3]
    return len(lines) < sum(shown(prometheus, query) for query in panel.queries)

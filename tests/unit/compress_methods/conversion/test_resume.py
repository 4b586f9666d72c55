"""Conversions that are killed, starved of disk or started twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed
from compress_methods.errors import CheckpointError, OutputError
from tests.robustness.process import finish, start
from tests.robustness.result import contents

KILLS = 6
RECIPE = """
formats: {w: {format: integer, bits: 4, group_size: 128}}
modules: [{match: blocks, format: w, algorithm: {algorithm: gptq, sweeps: 0}}]
calibration: {samples: 8, length: 128, held_out: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def finished_blocks(out: Path) -> int:
    return len(list(out.glob("block-*.safetensors")))


SEARCH = """
stages:
  - {transform: depth, drop: 5}
  - {transform: width, ffn: search}
  - formats: {w: {format: integer, bits: 4, group_size: 128}}
    modules: [{match: blocks, format: w, algorithm: {algorithm: gptq, sweeps: 0}}]
calibration: {samples: 4, length: 128, held_out: 4}
prune_to: {perplexity_increase: 100000%, steps: 4}
"""


@pytest.mark.slow
def test_a_search_over_a_chain_killed_in_every_part_ends_with_the_same_bytes(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    recipe, undisturbed, out = (tmp_path / name for name in ("recipe.yaml", "undisturbed", "out"))
    recipe.write_text(SEARCH)
    assert finish(start(novels_8m, recipe, undisturbed, some_text)) == 0
    moments = random.Random(0)
    for place in ("level-5000/.work/stage-1/", "level-5000/.work/stage-2/", "level-7500/"):
        process = start(novels_8m, recipe, out, some_text)
        while process.is_alive() and not any(place in path for path in written(out)):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert finish(process) == -signal.SIGKILL
        assert (out / INCOMPLETE).exists()
    assert finish(start(novels_8m, recipe, out, some_text)) == 0
    assert contents(out) == contents(undisturbed)
    assert not (out / ".work").exists()
    points = [json.loads((o / "report.json").read_text())["search"] for o in (undisturbed, out)]
    assert points[0] == points[1]


def written(out: Path) -> set[str]:
    """Every finished file of weights, wherever in the work folder."""
    # os.walk: folders may go while one looks.
    found = ((folder, name) for folder, _, names in os.walk(out) for name in names)
    return {f"{folder}/{name}" for folder, name in found if name.endswith(".safetensors")}


@pytest.mark.slow
def test_killed_at_random_moments_the_result_has_the_same_bytes(
    novels_8m: Path, some_text: Path, recipe: Path, tmp_path: Path
) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert finish(start(novels_8m, recipe, undisturbed, some_text)) == 0
    block = json.loads((undisturbed / "report.json").read_text())["run"]["seconds"] / 8
    moments = random.Random(0)
    kills = progressed = 0
    while kills < KILLS:
        goal = finished_blocks(out) + moments.randrange(3)
        process = start(novels_8m, recipe, out, some_text)
        while process.is_alive() and finished_blocks(out) < goal:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, block))
        process.kill()
        kills += finish(process) == -signal.SIGKILL
        if (out / INCOMPLETE).exists():
            progressed += finished_blocks(out) > 0
            with pytest.raises(CheckpointError, match="not finished"):
                open_compressed(out)
        elif out.exists():
            shutil.rmtree(out)
    assert progressed > 0
    assert finish(start(novels_8m, recipe, out, some_text)) == 0
    assert contents(out) == contents(undisturbed)
    assert not (out / ".work").exists()


def test_a_second_process_is_turned_away(
    novels_8m: Path, some_text: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(novels_8m, recipe, out, some_text)
    try:
        deadline = time.monotonic() + 60
        while not (out / ".work" / "journal.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGSTOP)
        with pytest.raises(OutputError, match="another process is converting into it"):
            convert(novels_8m, recipe, out, calibration=some_text, quiet=True)
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)
    assert finish(process) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB, less than the result takes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_too_little_disk_is_known_before_anything_is_written(
    small_disk: Path, novels_8m: Path, some_text: Path, recipe: Path
) -> None:
    with pytest.raises(OutputError, match=r"6\.0 MiB free, the conversion needs [\d.]+ MiB"):
        convert(novels_8m, recipe, small_disk / "out", calibration=some_text, quiet=True)
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_keeps_what_is_finished(
    small_disk: Path,
    novels_8m: Path,
    some_text: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress_methods.conversion import job as pipeline

    monkeypatch.setattr(pipeline, "require_room", lambda *_: None)
    out = small_disk / "out"
    with pytest.raises(OutputError, match=r"No space left on device.*same command continues"):
        convert(novels_8m, recipe, out, calibration=some_text, quiet=True)
    assert (out / INCOMPLETE).exists()
    assert not list(out.rglob("*.tmp"))
    journal = (out / ".work" / "journal.jsonl").read_text().splitlines()
    finished = [out / json.loads(line)["file"] for line in journal[1:]]
    assert finished
    stamps = [path.stat().st_mtime_ns for path in finished]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    convert(novels_8m, recipe, out, calibration=some_text, quiet=True)
    assert [path.stat().st_mtime_ns for path in finished] == stamps
    convert(novels_8m, recipe, tmp_path / "plain", calibration=some_text, quiet=True)
    assert contents(out) == contents(tmp_path / "plain")


def test_an_unwritable_place_is_one_line(novels_8m: Path, recipe: Path) -> None:
    with pytest.raises(OutputError, match="/proc"):
        convert(novels_8m, recipe, Path("/proc/out"), quiet=True)

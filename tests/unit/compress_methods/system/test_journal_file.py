"""A journal gives back every line up to the first damaged one, and goes on behind it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.system import journal_file
from compress_methods.system.journal_file import Contents, JournalFile

LINES: list[dict[str, Any]] = [
    {"fingerprint": "ab12"},
    {"unit": "layer é 0", "loss": 0.1 + 0.2, "none": None, "nested": {"a": [1, {"b": "\n\u2028"}]}},
    {"unit": "layer 1", "loss": float("inf"), "big": 2**70, "empty": {}},
    {},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def written(path: Path, lines: list[dict[str, Any]] = LINES) -> bytes:
    with JournalFile(path) as journal:
        for line in lines:
            journal.append(line)
    return path.read_bytes()


def test_no_file_is_an_empty_journal(path: Path) -> None:
    assert JournalFile(path).read() == Contents([], 0)
    assert not path.exists()


def test_lines_come_back_as_they_were(path: Path) -> None:
    written(path)
    assert JournalFile(path).read() == Contents(LINES, 0)


def test_each_line_is_json_with_the_checksum_of_the_rest(path: Path) -> None:
    for text, line in zip(written(path).decode().splitlines(), LINES, strict=True):
        assert json.loads(text) == {**line, "crc32": zlib.crc32(json.dumps(line).encode())}


def test_a_line_is_there_as_soon_as_it_is_appended(path: Path) -> None:
    journal = JournalFile(path)
    for count, line in enumerate(LINES, 1):
        journal.append(line)
        assert JournalFile(path).read() == Contents(LINES[:count], 0)
    journal.close()
    journal.close()
    journal.append({"after": "closing"})
    assert journal.read().lines[-1] == {"after": "closing"}


def test_cut_anywhere_the_whole_lines_before_it_stay(path: Path) -> None:
    data = written(path)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert JournalFile(path).read() == Contents(LINES[:whole], int(size not in (0, *ends)))


def test_a_flipped_bit_anywhere_ends_the_journal_at_its_line(path: Path) -> None:
    data = written(path)
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            found = JournalFile(path).read()
            whole = sum(start <= at for start in starts) - 1
            assert found.lines == LINES[:whole], (at, bit)
            assert found.dropped >= 1


def test_all_that_follows_damage_is_counted(path: Path) -> None:
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"layer", b"lager") + b"".join(lines[2:]))
    assert JournalFile(path).read() == Contents(LINES[:1], 3)


@pytest.mark.parametrize(
    "text", ["", "null", "[1]", "3", '"crc32"', "{}", '{"crc32": null}', "[" * 100_000, "\0" * 512]
)
def test_a_line_that_is_no_line_of_a_journal_is_damage(path: Path, text: str) -> None:
    data = written(path)
    path.write_bytes(data + text.encode() + b"\n" + data)
    assert JournalFile(path).read() == Contents(LINES, 1 + len(LINES))


def test_appending_goes_on_behind_the_last_whole_line(path: Path) -> None:
    data = written(path)
    path.write_bytes(data + data[:20])
    with JournalFile(path) as journal:
        assert journal.read() == Contents(LINES, 1)
        assert path.read_bytes() == data + data[:20]  # reading changes nothing
        journal.append({"next": 1})
        assert journal.read() == Contents([*LINES, {"next": 1}], 0)


def test_a_full_disk_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(path)

    class Full:
        """A file that takes ten bytes of each line, then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, piece: bytes) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            self.full = True
            return int(self.file.write(piece[:10]))

    with JournalFile(path) as journal:
        journal.append({"a": 1})
        file = journal._file
        journal._file = Full(file)  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left"):
            journal.append({"b": 2})
        journal._file = file
        journal.append({"c": 3})
    assert path.read_bytes().startswith(data)
    assert JournalFile(path).read() == Contents([*LINES, {"a": 1}, {"c": 3}], 0)


def test_short_writes_are_finished(path: Path) -> None:
    class Slow:
        """A file that takes three bytes at a time."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, piece: bytes) -> int:
            return int(self.file.write(piece[:3]))

    with JournalFile(path) as journal:
        journal._file = Slow(journal._open())  # type: ignore[assignment]
        for line in LINES:
            journal.append(line)
    assert JournalFile(path).read() == Contents(LINES, 0)


@pytest.mark.parametrize("durable", [True, False])
def test_durable_lines_are_flushed_to_the_disk(
    path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    folders: list[Path] = []
    monkeypatch.setattr(journal_file.os, "fsync", lambda number: flushed.append(number))
    monkeypatch.setattr(journal_file, "fsync_directory", folders.append)
    with JournalFile(path, durable=durable) as journal:
        journal.append({"a": 1})
        journal.append({"b": 2})
    assert len(flushed) == (2 if durable else 0)
    assert folders == ([path.parent] if durable else [])


@pytest.mark.parametrize("line", [{"crc32": 1}, {1: 2}])
def test_what_would_not_come_back_is_refused(path: Path, line: dict[Any, Any]) -> None:
    written(path)
    with JournalFile(path) as journal:
        with pytest.raises(ValueError, match="expected strings other than 'crc32'"):
            journal.append(line)
        with pytest.raises(TypeError):
            journal.append({"path": path})
    assert JournalFile(path).read() == Contents(LINES, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text().filter(lambda key: key != "crc32"), JSON), max_size=4))
def test_any_json_comes_back(lines: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.jsonl"
        with JournalFile(path, durable=False) as journal:
            for line in lines:
                journal.append(line)
        assert JournalFile(path).read() == Contents(lines, 0)


def test_a_kill_loses_no_line_that_was_appended(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from compress_methods.system.journal_file import JournalFile\n"
        "journal = JournalFile(Path(sys.argv[1]), durable=False)\n"
        "for number in range(10**9):\n"
        "    journal.append({'number': number}); print(number, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(200)][-1]
    os.kill(child.pid, signal.SIGKILL)
    told = max([told, *map(int, child.stdout.read().split("\n")[:-1])])
    child.wait()
    found = JournalFile(path).read()
    assert found.lines == [{"number": number} for number in range(len(found.lines))]
    assert len(found.lines) > told

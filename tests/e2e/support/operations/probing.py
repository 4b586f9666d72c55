"""The probes of `compare`, few and short, and what a report must say of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY
from vllm_compress.operations.abtest.probes.files import CHOICES, KINDS


def shorter_probes(folder: Path, count: int, max_tokens: int) -> Path:
    """The shipped probes, few of each kind and with short answers."""
    folder.mkdir()
    for path in (REPOSITORY / "configs" / "probes").glob("*.yaml"):
        block = yaml.safe_load(path.read_text())
        block["probes"] = block["probes"][:count]
        if "max_tokens" in block:
            block["max_tokens"] = max_tokens
        if "words" in block:
            block |= {"words": block["words"][-1:], "probes": block["probes"][:1]}
        (folder / path.name).write_text(yaml.safe_dump(block))
    return folder


def check_every_kind(out: Path, printed: str) -> None:
    """What both were asked has a figure; what they refused is said in the servers' words."""
    page = (out / "report.html").read_text(encoding="utf-8")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = {row["metric"]: row for row in report["metrics"]}
    kinds = {entry["kind"]: entry for entry in report["probes"]}
    assert tuple(kinds) == KINDS
    for kind, entry in kinds.items():
        assert f"<td>{kind}<" in page
        row, asked, refused = rows[f"probes/{kind}"], entry["asked"], entry["refused"]
        assert refused["a"] == refused["b"], kind
        assert row["n"] == asked - refused["a"]
        for side in "ab":
            assert bool(refused[side]) == bool(entry["why"][side])
            assert entry["why"][side] in printed
        if row["n"]:
            assert (row["a"], row["b"]) == (
                entry["right"]["a"] / row["n"],
                entry["right"]["b"] / row["n"],
            )
        if kind != CHOICES:  # few tokens end no answer, which is then wrong or right
            assert entry["cut"]["b"] == row["n"], kind
        if kind != CHOICES and row["n"]:
            assert f"probes/{kind}: of {asked} answers of B {asked} cut" in printed
    assert kinds["needle"]["refused"]["b"] == kinds["needle"]["asked"]
    assert "context length" in kinds["needle"]["why"]["b"]
    assert sum(row["n"] for name, row in rows.items() if name.startswith("probes/")) > 20

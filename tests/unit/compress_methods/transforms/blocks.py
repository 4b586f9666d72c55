"""The first block of a model as passes see it, and states that go into it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.source import open_source
from compress_methods.conversion.part import BlockPart, Planned
from compress_methods.conversion.planning.plan import Plan, Shard
from compress_methods.model.block_runner import BlockRunner
from compress_methods.system.progress import Progress

SEQUENCES, LENGTH = 4, 24


def open_block(directory: Path) -> tuple[BlockPart, Tensor]:
    """Block 0 of a checkpoint and states [SEQUENCES, LENGTH, hidden]; nothing of it is packed."""
    skeleton = open_skeleton(directory)
    source = open_source(directory, skeleton, directory.name, False)
    runner = BlockRunner(skeleton, SEQUENCES)
    tables = {f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"}
    for name in skeleton.parameter_names():
        if name not in tables:
            runner.load({name: source.read(name)})
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=draw)
    rows = tokens.unique()
    table = source.read(skeleton.slots[skeleton.embedding].parameter)
    states = runner.embed(tokens, table[rows].float(), rows)
    part = BlockPart(
        Planned(skeleton, source, cast(Plan, None)),
        Shard("block-00000", 0, (), ()),
        0,
        torch.device("cpu"),
        Progress(1, "testing", quiet=True),
        runner=runner,
        states={"calibration": states},
        calibration="calibration",
        teacher="teacher",
    )
    return part, states

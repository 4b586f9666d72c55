"""carried: other outputs of a block that go on to the model's end while blocks are surveyed, so
that what a change of the block does to the predictions is known.

They are kept among the states of the sweep, whose blocks move them on like all others, and in the
journal with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress_methods.conversion.held_out import Written, outside
from compress_methods.conversion.part import BlockPart
from compress_methods.evaluation.metrics import token_kl
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.device import pinned

PREFIX, ROWS = "carried-", "carried rows"


def take(part: BlockPart, row: str) -> dict[str, Tensor]:
    """States for the sweep, of what a pass had the block carry; `row` is where it is judged."""
    if not part.carried:
        return {}
    found = {
        f"{PREFIX}{row}-{k:05d}": pinned(states, part.device)
        for k, states in enumerate(part.carried)
    }
    part.carried = []
    return {**found, ROWS: part.carried_rows}


def judge(
    states: dict[str, Tensor], calibration: Tensor, runner: BlockRunner, written: Written
) -> None:
    """Put the KL of what was carried behind the rows it belongs to, in place of the states."""
    carried = {name: t for name, t in states.items() if name.startswith(PREFIX)}
    if not carried:
        return
    found = divergences(runner, written, calibration[states.pop(ROWS)], carried)
    for name in sorted(carried):
        del states[name]
        row = name.removeprefix(PREFIX).rpartition("-")[0]
        kl = torch.tensor([found[name]], dtype=torch.float64)
        states[row] = torch.cat([states[row], kl])


def divergences(
    runner: BlockRunner, written: Written, base: Tensor, others: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mean KL per token of what the original predicts from `base` to what it does from each of
    `others`, all states [sequences, length, hidden] after the last block."""
    runner.load(outside(written)["base"])
    sums = dict.fromkeys(others, 0.0)
    for i in range(len(base)):
        expected = runner.logits(base[i : i + 1])[0]
        for name, states in others.items():
            found = runner.logits(states[i : i + 1])[0]
            sums[name] += float(token_kl(expected, found).sum(dtype=torch.float64))
    runner.unload(runner.skeleton.head)
    return {name: total / base[..., 0].numel() for name, total in sums.items()}

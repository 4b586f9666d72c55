"""Conversions that are killed at random moments and started again with the same command."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed
from compress_methods.errors import CheckpointError
from tests.robustness.outcomes import Outcome, Tally
from tests.robustness.process import finish, start
from tests.robustness.result import RECIPES, TEXT, contents, recipe, tiny_model

# After so many kills in a row the conversion may end; then its bytes are compared.
IN_A_ROW = 4


def try_kills(kills: int, folder: Path, chance: random.Random) -> Tally:
    """`kills` of them, shared by the recipes. One whose result has other bytes in the end, or that
    opens though it is not finished, is silent; one that cannot be continued has crashed."""
    tally = Tally("conversion killed at a random moment and started again")
    model = tiny_model(folder / "model")
    for number, name in enumerate(RECIPES):
        whole, chosen = folder / f"{name}-whole", recipe(name, folder)
        finish(start(model, chosen, whole, model / TEXT))
        began = time.monotonic()
        shutil.rmtree(whole)
        assert finish(start(model, chosen, whole, model / TEXT)) == 0
        seconds = time.monotonic() - began
        expected = contents(whole)
        share = kills * (number + 1) // len(RECIPES)
        while tally.tried < share:
            _one_chain(
                (model, chosen, folder / "out", model / TEXT),
                expected,
                tally,
                [chance.uniform(0, seconds) for _ in range(min(IN_A_ROW, share - tally.tried))],
            )
    return tally


def _one_chain(
    command: tuple[Path, Path, Path, Path],
    expected: dict[str, bytes],
    tally: Tally,
    moments: list[float],
) -> None:
    """Kill at each of `moments` after a start, as long as one is left to kill; then let it end."""
    out, name = command[2], command[1].stem
    killed, opened = 0, False
    for moment in moments:
        process = start(*command)
        process.join(moment)
        process.kill()
        if finish(process) != -signal.SIGKILL:
            break
        killed += 1
        opened |= (out / INCOMPLETE).exists() and _opens(out)
    code = finish(start(*command))
    same = code == 0 and contents(out) == expected and not (out / ".work").exists()
    for _ in range(killed):
        if code != 0:
            tally.add(Outcome.CRASHED, f"{name}: could not be continued after {moments}")
        elif opened or not same:
            tally.add(Outcome.SILENT, f"{name}: other bytes after {moments}")
        else:
            tally.add(Outcome.VALUE, name)
    shutil.rmtree(out)


def _opens(out: Path) -> bool:
    try:
        open_compressed(out)
    except CheckpointError:
        return False
    return True

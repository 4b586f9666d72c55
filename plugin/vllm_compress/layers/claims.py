"""Whether every compressed matrix was asked for by a layer of the model that vLLM built.

A layer that vLLM's class builds without a name, or under a name we do not know, is built without
our method: its tensors then meet no parameter, which some loaders report by a page and others not
at all. The first tensor that is loaded, of whatever matrix, finds the model complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from compress_methods.errors import CheckpointError
from vllm_compress.targets import Target

BLOCK = re.compile(r".*?\.\d+\.")
SHOWN = 3


class Claims:
    """Plain data, since vLLM pickles it to its workers before any layer exists."""

    def __init__(self) -> None:
        self.claimed: set[tuple[str, bool]] = set()
        self.expected: tuple[Target, ...] = ()
        self.checked = False

    def expect(self, targets: Iterable[Target]) -> None:
        """Say which matrices some layer has to ask for."""
        self.expected = tuple(targets)

    def add(self, targets: Iterable[Target]) -> None:
        """Say that a layer has these."""
        self.claimed |= {(target.module, target.shared) for target in targets}

    def check(self) -> None:
        """Raise `CheckpointError` naming matrices that no layer has; once, with the model built."""
        if self.checked:
            return
        self.checked = True
        missing = [t.module for t in self.expected if (t.module, t.shared) not in self.claimed]
        if missing and _pipeline_ranks() > 1:
            self._check_shared()
            # The other ranks have whole blocks, and the vocabulary of the first or the last.
            here = {_block(module) for module, _ in self.claimed} - {""}
            missing = [module for module in missing if _block(module) in here]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise CheckpointError(
                f"{', '.join(missing[:SHOWN])}{more}: compressed, but no layer that vLLM built "
                "asks for it by that name; convert again with a rule that keeps it as it is"
            )

    def _check_shared(self) -> None:
        """Raise `CheckpointError` where another pipeline rank has a layer that shares weights with
        one of this rank's."""
        for target in self.expected:
            here = [(target.module, shares) in self.claimed for shares in (True, False)]
            if target.shared and here[0] != here[1]:
                raise CheckpointError(
                    f"{target.module}: shared by layers of several pipeline ranks, which cannot "
                    "share weights; use pipeline-parallel size 1"
                )


def _block(module: str) -> str:
    """Name of the numbered block that a module is in, or nothing."""
    match = BLOCK.match(module)
    return match.group() if match else ""


def _pipeline_ranks() -> int:
    from vllm.distributed import get_pp_group

    try:
        return int(get_pp_group().world_size)
    except AssertionError:
        return 1  # no process group: nothing is divided

"""How conversions and trainings are computed: where, in which dtype, and by how many processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compress_methods.model.device import signature
from compress_methods.system.processes import Processes, join


@dataclass(frozen=True)
class Running:
    """On which device, forward passes in which dtype, whether it tells of its progress, and which
    of several processes this is. `survey`: a file for what passes survey, where sweeps share it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    quiet: bool = False
    survey: Path | None = None
    processes: Processes = field(default_factory=Processes)

    def joined(self) -> Running:
        """The same beside the processes that were started with this one, each on its own device;
        only the first tells of progress. `CompressError` where they do not meet."""
        processes, device = join(self.device)
        quiet = self.quiet or not processes.leads
        return replace(self, device=device, quiet=quiet, processes=processes)

    @property
    def signature(self) -> str:
        """What the bits of a result depend on besides the inputs."""
        count = self.processes.count
        return signature(self.device) + (f", {count} processes" if count > 1 else "")

"""What several processes share, and what is said when they cannot meet."""

from __future__ import annotations

import pytest
import torch

from compress_methods.errors import CompressError
from compress_methods.model.device import unit_size
from compress_methods.system.processes import Processes, join, one_voice


@pytest.mark.parametrize(("count", "ways"), [(8, 2), (10, 3), (7, 7), (5, 1), (2, 3)])
def test_shares_are_all_there_is_in_order(count: int, ways: int) -> None:
    for unit in (1, unit_size(ways, count)):
        things = list(range(count))
        shares = [things[Processes(ways, rank).share(count, unit)] for rank in range(ways)]
        assert [thing for share in shares for thing in share] == things
        sizes = [len(share) // unit for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("samples", "held", "ways"), [(128, 8, 3), (16, 4, 4), (9, 6, 2), (3, 0, 3)]
)
def test_every_process_has_something_to_calibrate_on(samples: int, held: int, ways: int) -> None:
    unit = unit_size(ways, samples, held)
    assert samples % unit == 0
    assert held % unit == 0
    assert all(range(samples)[Processes(ways, rank).share(samples, unit)] for rank in range(ways))


def test_one_process_needs_no_meeting() -> None:
    alone = Processes()
    tensor = torch.ones(3)
    alone.add(tensor)
    alone.spread(tensor, 0)
    assert tensor.tolist() == [1, 1, 1]
    assert alone.gathered("a") == ["a"]
    assert alone.first(lambda: 7) == 7
    assert [rank for rank, _ in alone.collected({"t": tensor})] == [0]
    with alone.in_turn():
        alone.wait()


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        CompressError, match=r"WORLD_SIZE is 2, but the processes do not meet.*RANK"
    ):
        join(torch.device("cpu"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(CompressError, match=r"MASTER_ADDR.*start them with torchrun, or unset it"):
        join(torch.device("cpu"))
    with pytest.raises(SystemExit) as ended, one_voice():
        raise CompressError("what the first process says as well")
    assert ended.value.code == 2

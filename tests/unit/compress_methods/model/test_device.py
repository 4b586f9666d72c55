"""Names of devices, how many sequences go together, and what bits hang on."""

from __future__ import annotations

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import CompressError
from compress_methods.model.device import (
    MOST_SEQUENCES,
    batch_size,
    exact_products,
    peak_device_bytes,
    pinned,
    resolve_device,
    signature,
)

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many GPUs as a test is given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_a_name_becomes_a_device(name: str, expected: str) -> None:
    assert resolve_device(name) == torch.device(expected)
    assert resolve_device(torch.device(expected)) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "name", "words"),
    [
        (0, "cuda", "--device is 'cuda', but this machine has 0 GPUs"),
        (2, "cuda:2", "--device is 'cuda:2', but this machine has 2 GPUs"),
        (2, "gpu", "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
        (2, "cuda:x", "--device is 'cuda:x', expected auto, cpu, cuda or cuda:N"),
        (2, "cuda:-1", "--device is 'cuda:-1', expected auto, cpu, cuda or cuda:N"),
        (2, "", "--device is '', expected auto"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_a_device_that_is_not_there_is_one_line(name: str, words: str) -> None:
    with pytest.raises(CompressError) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(words)


@given(st.integers(1, 300), st.integers(0, 300))
def test_on_cpus_the_largest_batch_up_to_eight_that_divides_all(a: int, b: int) -> None:
    found = batch_size(CPU, 10**9, a, b)
    assert a % found == b % found == 0
    assert found == max(n for n in range(1, MOST_SEQUENCES + 1) if gcd(a, b) % n == 0)


@pytest.mark.parametrize(
    ("free", "expected"), [(10**12, 64), (4 * 64 * 10**6, 64), (4 * 63 * 10**6, 32), (0, 1)]
)
def test_on_gpus_as_many_as_a_quarter_of_the_free_memory_holds(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    assert batch_size(torch.device("cuda"), 10**6, 128, 64) == expected


def test_bits_hang_on_the_kind_of_device_and_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = signature(CPU)
        torch.set_num_threads(2)
        assert (one, signature(CPU)) == ("cpu, 1 threads", "cpu, 2 threads")
    finally:
        torch.set_num_threads(before)


def test_on_cpus_nothing_is_pinned_nor_counted() -> None:
    states = torch.randn(2, 3)
    assert pinned(states, CPU) is states
    assert peak_device_bytes(CPU) is None


def test_float32_is_multiplied_as_float32() -> None:
    owners = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = True
        exact_products()
        assert [owner.allow_tf32 for owner in owners] == [False, False]
    finally:
        for owner, allowed in zip(owners, before, strict=True):
            owner.allow_tf32 = allowed

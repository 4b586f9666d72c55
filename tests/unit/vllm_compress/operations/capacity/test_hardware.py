"""Machines by name, this machine, and prices."""

from __future__ import annotations

import pytest

from vllm_compress.operations.capacity.hardware import (
    HardwareError,
    find_hardware,
    hardware_names,
    with_prices,
)

H100 = find_hardware("h100-80gb")


def test_names_of_hardware_lead_to_one_entry_each() -> None:
    keys = {find_hardware(name).key for name in hardware_names() if name != "local"}
    assert 12 <= len(keys) <= 20
    assert find_hardware("h100-80gb").key == find_hardware("h100").key == "h100-sxm"
    with pytest.raises(HardwareError, match="did you mean 'h100'"):
        find_hardware("h10")


def test_this_machine_is_hardware_too() -> None:
    local = find_hardware("local")
    assert local.kind == "cpu"
    assert local.memory_bytes > 1e8
    assert local.bandwidth_bytes_per_s > 1e8


def test_prices_go_to_the_entry_an_alias_means() -> None:
    (priced,) = with_prices([H100], ["h100-80gb=2.5"])
    assert priced.price_per_hour == 2.5
    for bad in ("h100", "h100=x", "h100=-1"):
        with pytest.raises(HardwareError, match="NAME=PRICE"):
            with_prices([H100], [bad])

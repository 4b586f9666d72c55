"""Machines by name, this machine, and prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_compress.operations.capacity.hardware import (
    HardwareError,
    find_hardware,
    hardware_names,
    posted_note,
    read_prices,
    with_prices,
)

H100 = find_hardware("h100-80gb")


def test_names_of_hardware_lead_to_one_entry_each() -> None:
    keys = {find_hardware(name).key for name in hardware_names() if name != "local"}
    assert 16 <= len(keys) <= 24
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
    for bad in ("h100", "h100=x", "h100=-1", "h100=inf"):
        with pytest.raises(HardwareError, match="NAME=PRICE"):
            with_prices([H100], [bad])


def test_prices_of_a_file_give_way_to_those_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "spot.yaml"
    path.write_text("h100-80gb: 1.1\nl4: 0.2\n")
    assert read_prices(path) == {"h100-sxm": 1.1, "l4": 0.2}
    h100, l4 = with_prices([H100, find_hardware("l4")], ["h100=2"], path)
    assert (h100.price_per_hour, l4.price_per_hour) == (2.0, 0.2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "expected lines of NAME: PRICE"),
        ("h100: cheap\n", "h100 is 'cheap', expected a price"),
        ("h100: -1\n", "h100 is -1"),
        ("h100: .inf\n", "h100 is inf"),
        ("h10: 1\n", "unknown 'h10'; did you mean 'h100'"),
        ("h100: 1\nh100-80gb: 2\n", "h100-80gb and another name of h100-sxm both"),
    ],
)
def test_prices_that_are_none_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "spot.yaml"
    path.write_text(text)
    with pytest.raises(HardwareError) as found:
        read_prices(path)
    assert words in str(found.value)
    assert str(path) in str(found.value)


def test_every_machine_but_this_one_has_rated_watts() -> None:
    for name in hardware_names():
        watts = find_hardware(name).watts
        assert watts is None if name == "local" else 50 < (watts or 0) <= 2000


def test_posted_prices_are_taken_where_nobody_has_one_and_said() -> None:
    cards = [H100, find_hardware("l4"), find_hardware("b300")]
    posted = with_prices(cards, [])
    assert [m.price_per_hour for m in posted] == [3.78, 0.8, None]
    note = posted_note(posted)
    assert "h100-sxm 3.78 (Lambda on demand, 2026-05-07" in note
    assert "b300" not in note
    mine = with_prices(cards, ["l4=0.5"])
    assert [m.price_per_hour for m in mine] == [None, 0.5, None]
    assert posted_note(mine) == ""


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("architecture", "hopper", "architecture is 'hopper', expected sm90"),
        ("architecture", None, "architecture is None, expected sm90"),
        ("posted_price", -1, "posted_price is -1"),
        ("posted_by", "a shop", "posted_by is 'a shop', expected who and a date"),
    ],
)
def test_what_a_card_is_compiled_for_and_who_posted_a_price_are_told(
    field: str, value: object, words: str
) -> None:
    with pytest.raises(HardwareError, match=words):
        replace(H100, **{field: value})

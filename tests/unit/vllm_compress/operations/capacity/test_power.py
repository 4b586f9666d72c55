"""Energy of a plan, and assumptions that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_compress.operations.capacity.power import Power, PowerError, read_power


def test_idle_and_busy_devices_draw_their_shares() -> None:
    power = Power(busy=0.8, idle=0.1, overhead=1.5)
    assert power.watts(700, 2, 0.0) == pytest.approx(2 * 70 * 1.5)
    assert power.watts(700, 2, 1.0) == pytest.approx(2 * 560 * 1.5)
    assert power.watts(700, 2, 0.5) == pytest.approx(2 * 315 * 1.5)


def test_energy_and_co2_of_a_million_tokens() -> None:
    """1 kW at 1,000 tokens/s is a joule per token: a million of them are 1/3.6 kWh."""
    power = Power(grams_per_kwh=360)
    kwh = power.kwh_per_million(1000, 1000)
    assert kwh == pytest.approx(1 / 3.6)
    assert power.co2_kg_per_million(kwh) == pytest.approx(0.1)
    assert Power().co2_kg_per_million(kwh) is None


def test_a_number_is_grams_and_a_file_has_everything(tmp_path: Path) -> None:
    assert read_power(None) == Power()
    assert read_power("56") == Power(grams_per_kwh=56)
    path = tmp_path / "grid.yaml"
    path.write_text("grams_per_kwh: 400\noverhead: 1.3\nbusy: 0.9\n")
    found = read_power(str(path))
    assert found == Power(0.9, 0.12, 1.3, 400)
    assert "90%" in found.said
    assert "400 g per kWh" in found.said
    assert "CO2" not in Power().said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grams: 4\n", "unknown key 'grams'"),
        ("overhead: 0.9\n", "overhead is 0.9, expected a number from 1"),
        ("idle: 0.9\n", "idle is 0.9 and busy 0.75, expected 0 <= idle <= busy <= 1"),
        ("grams_per_kwh: -1\n", "grams_per_kwh is -1, expected a number from 0"),
        ("grams_per_kwh: .nan\n", "grams_per_kwh is nan"),
        ("busy: much\n", "busy is 'much'"),
        ("3\n", "expected a mapping"),
        ("", "expected a mapping"),
    ],
)
def test_assumptions_that_are_none_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(PowerError, match=words) as found:
        read_power(str(path))
    assert str(path) in str(found.value)


def test_a_grid_is_a_number_from_0_or_a_file(tmp_path: Path) -> None:
    for bad in ("-3", "nan", "inf"):
        with pytest.raises(PowerError, match=f"--grid is '{bad}'"):
            read_power(bad)
    with pytest.raises(PowerError, match="no such file"):
        read_power(str(tmp_path / "none.yaml"))

"""The README's figures are those that the benchmarks have kept."""

from tests.benchmarks.readme import BLOCK, README, filled


def test_tables_are_those_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) > 5
    assert filled(text) == text

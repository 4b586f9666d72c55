"""Try all inputs and write the table of tests/README.md: python -m tests.robustness"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from tests.robustness.flips import try_flips
from tests.robustness.kills import try_kills
from tests.robustness.outcomes import Tally, table
from tests.robustness.user_files import READERS, try_files

FILES, FLIPS, KILLS = 2000, 2000, 200
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- robustness -->\n", "<!-- end -->\n"


def main() -> int:
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for reader in READERS:
            (folder / reader).mkdir()
            tallies.append(try_files(reader, FILES, folder / reader))
        tallies.append(try_flips(FLIPS, folder, random.Random(0)))
        tallies.append(try_kills(KILLS, folder, random.Random(0)))
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + table(tallies) + END + after)
    faults = [f"{tally.kind}: {fault}" for tally in tallies for fault in tally.faults]
    print(table(tallies), *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

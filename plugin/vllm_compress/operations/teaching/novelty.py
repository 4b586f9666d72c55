"""Texts that say nearly the same, found without comparing all with all: MinHash.

A text is the set of its runs of five letters; two texts are duplicates where

    |A and B| / |A or B| >= 0.7        (Jaccard)

The smallest of 128 hashes of each set agree with that probability (Broder, 1997), and a table of
bands of them (locality-sensitive hashing) finds the candidates. The sets themselves then decide, so
no two texts are called alike that are not.

Needs: datasketch. Fails where: two texts lie near the threshold, of which some are not found.
"""

from __future__ import annotations

from datasketch import MinHash, MinHashLSH

from vllm_compress.operations.teaching.similarity import words

THRESHOLD = 0.7
RUN = 5
HASHES = 128
SEARCHED = 0.6
"""Bands are made for texts less alike than duplicates are, so that few of those are missed."""


def runs(text: str) -> frozenset[str]:
    """The set a text is compared by; spaces, signs and case do not count."""
    line = " ".join(words(text))
    return frozenset(line[i : i + RUN] for i in range(max(1, len(line) - RUN + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """How alike two sets are, 0 to 1."""
    return len(one & other) / len(one | other)


class Novelty:
    """Texts of which none says nearly the same as one before it."""

    def __init__(self) -> None:
        self._tables = MinHashLSH(threshold=SEARCHED, num_perm=HASHES)
        self._sets: list[frozenset[str]] = []

    def add(self, text: str) -> bool:
        """Take in a text and return True, unless one that was taken in is nearly the same."""
        found = runs(text)
        hashes = MinHash(num_perm=HASHES)
        hashes.update_batch([run.encode() for run in sorted(found)])
        if any(jaccard(found, self._sets[i]) >= THRESHOLD for i in self._tables.query(hashes)):
            return False
        self._tables.insert(len(self._sets), hashes)
        self._sets.append(found)
        return True

"""Which texts are alike: the cosine of their words' weights.

    tf-idf      a word that occurs c times in a text and in d of n texts weighs
                c * (1 + log((1 + n) / (1 + d)))
    similarity  cosine of two texts' weights, 0 to 1

Fails where: texts say the same in other words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text in order, upper and lower case alike."""
    return WORD.findall(text.casefold())


class Similarity:
    """Similarities among some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        spread = Counter(word for count in counts for word in count)
        columns = {word: i for i, word in enumerate(spread)}
        rows = [i for i, count in enumerate(counts) for _ in count]
        weight = {w: 1 + math.log((1 + len(texts)) / (1 + d)) for w, d in spread.items()}
        values = np.array([c * weight[w] for count in counts for w, c in count.items()])
        places = [columns[word] for count in counts for word in count]
        matrix = csr_matrix((values, (rows, places)), shape=(len(texts), len(columns) or 1))
        lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
        scale = np.repeat(1 / np.maximum(lengths, 1e-12), np.diff(matrix.indptr))
        self._matrix = csr_matrix(
            (matrix.data * scale, matrix.indices, matrix.indptr), shape=matrix.shape
        )

    def to(self, i: int) -> np.ndarray:
        """Similarity of text i to every text, [n]."""
        found = self._matrix @ self._matrix[i].toarray().ravel()
        return np.asarray(found)

"""The encoder that always works: a signed hashed bag of words. No weights, no MLX, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from agentmem.episode.words import content_words, stem, words

DIMS = 512
_SIGN = 1 << 63


class HashedEncoder:
    """Stems of content words, each hashed to one of 512 places and a sign, weighted by log(1 + count). Thread-safe.

    It knows words, not meanings: routing by it is clearly weaker than by a sentence encoder.
    """

    name = "hash512"
    dims = DIMS

    def encode(self, texts: Sequence[str], query: bool = False) -> NDArray[np.float32]:
        """Unit rows float32 [len(texts), 512]; `query` makes no difference here."""
        rows = np.zeros((len(texts), DIMS), np.float64)
        for row, text in zip(rows, texts, strict=True):
            # Whoever says nothing but stop words is still not equal to everybody else who does.
            terms = [stem(w) for w in content_words(text)] or words(text) or [text]
            for term, count in Counter(terms).items():
                place = xxhash.xxh64_intdigest(term.encode("utf-8", "surrogatepass"))
                row[place % DIMS] += np.log1p(count) * (1.0 if place & _SIGN else -1.0)
            if not row.any():  # terms of one place and opposite signs
                row[0] = 1.0
            row /= np.linalg.norm(row)
        return rows.astype(np.float32)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many words each text has: all are read."""
        return [len(words(text)) for text in texts]

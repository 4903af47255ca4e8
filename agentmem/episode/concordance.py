"""Which utterance holds which words: what is looked up by name or number, which vectors tell apart badly."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agentmem.episode.segment import Segment
from agentmem.episode.utterance import LONG, SPEAKERS, Utterance, sentences
from agentmem.episode.words import content_words, stem

OTHERS = 0.7
"""What words count of somebody else than the speaker whom a question names."""
FEWEST = 2
"""A question has as much to be found as so many words that were never said: thanks are not found wherever thanks were said."""
_LABELS = frozenset(SPEAKERS.values())


class Concordance:
    """Where the words of a conversation stand, by utterance; of a long one, by sentence. Words are compared by their stems.

    Names of speakers are words of what they say; `User` and `Assistant` are no names.
    """

    def __init__(self) -> None:
        self._places: dict[str, array[int]] = {}
        self._segments, self._speakers = array("q"), array("q")
        self._names: dict[str, frozenset[str]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Segments."""
        return self._count

    def add(self, utterances: Sequence[Utterance]) -> None:
        """Take in the utterances of the next segment."""
        for utterance in utterances:
            name = utterance.speaker
            if name not in self._names:
                self._names[name] = frozenset() if name in _LABELS else stems(name)
            parts = sentences(utterance.text) if len(utterance.text) > LONG else [utterance.text]
            for part in parts:
                for term in stems(part) | self._names[name]:
                    self._places.setdefault(term, array("q")).append(len(self._segments))
                self._segments.append(self._count)
                self._speakers.append(list(self._names).index(name))
        self._count += 1

    def cut(self, segments: int) -> None:
        """Forget the segments behind the first ones."""
        stop = bisect_left(self._segments, segments)
        del self._segments[stop:], self._speakers[stop:]
        for term, places in list(self._places.items()):
            del places[bisect_left(places, stop) :]
            if not places:
                del self._places[term]
        self._count = min(self._count, segments)

    def coverage(self, question: str) -> NDArray[np.float64]:
        """How much of a question's words one utterance of each segment has at most, 0 to 1: float64 [segments].

        A word counts as much as it is rare (inverse document frequency, as in BM25).
        """
        wanted, parts = stems(question), len(self._segments)
        found, held, most = np.zeros(self._count), np.zeros(parts), 0.0
        for term in sorted(wanted):
            places = np.frombuffer(self._places.get(term, array("q")), np.int64)
            weight = math.log1p((parts - len(places) + 0.5) / (len(places) + 0.5))
            held[places] += weight
            most += weight
        if not wanted:
            return found
        named = [number for number, name in enumerate(self._names.values()) if name & wanted]
        theirs = np.isin(np.frombuffer(self._speakers, np.int64), named)
        if theirs.any():
            held[~theirs] *= OTHERS
        unsaid = math.log1p((parts + 0.5) / 0.5)
        np.maximum.at(found, np.frombuffer(self._segments, np.int64), held / max(most, FEWEST * unsaid))
        return found


def concordance_of(utterances: Sequence[Utterance], segments: Sequence[Segment]) -> Concordance:
    """Of segments of these utterances."""
    made = Concordance()
    for segment in segments:
        made.add(utterances[segment.first : segment.last + 1])
    return made


def stems(text: str) -> frozenset[str]:
    """What is compared of a text's words."""
    return frozenset(stem(word) for word in content_words(text))

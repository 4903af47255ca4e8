"""Segments: a few utterances that follow one another, the unit that is embedded and belongs to a topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentmem.episode.utterance import Utterance

WINDOW = 4
"""Utterances of a segment (EpiCache, section 3.1); sessions and their dates are no part of its text."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Utterances `first` to `last`, both included, as one text; tokens [start, stop) of the agent's log."""

    first: int
    last: int
    text: str
    start: int
    stop: int


def segments_of(utterances: Sequence[Utterance], window: int = WINDOW) -> list[Segment]:
    """Windows of utterances one behind the other; the last may be shorter. Where a log grows, whole ones stay as they are."""
    return [
        _segment(utterances, i, min(i + window, len(utterances))) for i in range(0, len(utterances), window)
    ]


def _segment(utterances: Sequence[Utterance], first: int, stop: int) -> Segment:
    said = utterances[first:stop]
    text = "\n".join(f'{u.speaker} said, "{u.text}"' for u in said)
    return Segment(first, stop - 1, text, said[0].start, said[-1].stop)

"""A few words by which people know a topic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from agentmem.episode.segment import Segment
from agentmem.episode.topic import Topic
from agentmem.episode.words import content_words, stem

WORDS = 3


def titles(topics: Sequence[Topic], segments: Sequence[Segment], count: int = WORDS) -> dict[int, str]:
    """For each topic the words that are frequent in its segments and rare in those of others, such as "garden, seeds, fence"."""
    stems: dict[int, Counter[str]] = {}
    forms: Counter[tuple[str, str]] = Counter()
    for topic in topics:
        found = [(stem(w), w) for s in topic.members for w in content_words(segments[s].text)]
        forms.update(found)
        stems[topic.id] = Counter(s for s, w in found if not w.isdigit())
    spread = Counter(s for counter in stems.values() for s in counter)
    best: dict[str, str] = {}
    for (s, word), _ in sorted(forms.items(), key=lambda item: (-item[1], item[0])):
        best.setdefault(s, word)
    out = {}
    for number, counter in stems.items():
        weight = {s: n * math.log(1 + len(topics) / spread[s]) for s, n in counter.items()}
        chosen = sorted(weight, key=lambda s: (-weight[s], s))[:count]
        out[number] = ", ".join(best[s] for s in chosen)
    return out

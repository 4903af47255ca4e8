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
    """For each topic the words that more of its segments hold than of all others, such as "garden, seeds, fence".

    Names of the speakers are in all segments, so they are none of these words.
    """
    forms: Counter[tuple[str, str]] = Counter()
    stems: dict[int, Counter[str]] = {}
    for topic in topics:
        stems[topic.id] = Counter()
        for number in topic.members:
            found = {(stem(w), w) for w in content_words(segments[number].text) if not w.isdigit()}
            forms.update(found)
            stems[topic.id].update({s for s, _ in found})
    total = sum(map(len, topics))
    everywhere: Counter[str] = sum(stems.values(), Counter())
    best: dict[str, str] = {}
    for (s, word), _ in sorted(forms.items(), key=lambda item: (-item[1], item[0])):
        best.setdefault(s, word)
    out = {}
    for topic in topics:
        share = {s: n / len(topic) for s, n in stems[topic.id].items()}
        weight = {s: f * math.log(f * total / everywhere[s]) for s, f in share.items()}
        chosen = sorted(weight, key=lambda s: (-weight[s], -share[s], s))[:count]
        out[topic.id] = ", ".join(best[s] for s in chosen)
    return out

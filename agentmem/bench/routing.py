"""How often a question is routed to an episode that holds what it is about."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agentmem.bench.checks import check
from agentmem.bench.transcripts import Dialogue
from agentmem.episode.concordance import concordance_of
from agentmem.episode.encoder import Encoder, thresholds_of
from agentmem.episode.routing import route
from agentmem.episode.segment import WINDOW, segments_of
from agentmem.episode.topic import cluster, cosines

EPISODES = 4
WAYS = ("alone", "turns", "vote", "words", "centroid", "chance", "largest")
VOTERS = 3
WANTED = {"minilm": 0.70}
"""Hit rates asked for with four episodes on labelled conversations; others are reported only."""


def hit_rates(
    encoder: Encoder, dialogues: Sequence[Dialogue], episodes: int | None = EPISODES
) -> dict[str, Any]:
    """Shares of the questions with evidence whose episode holds a segment of it.

    alone: every question alone, no floor. turns: the whole rule, each question's episode being active for the next one.
    For comparison, vote: most of the three nearest segments, the nearer centroid between equals; words: the segment with most of
    the question's words; centroid: the nearest centroid; chance, largest: an episode at random, and always the largest one.
    """
    floor = thresholds_of(encoder.name).question
    hits: dict[str, list[float]] = {way: [] for way in WAYS}
    each, segments, seconds = {}, 0, 0.0
    for dialogue in dialogues:
        parts = segments_of(dialogue.utterances)
        texts, concordance = [s.text for s in parts], concordance_of(dialogue.utterances, parts)
        questions = [q for q in dialogue.questions if q.evidence]
        start = time.perf_counter()
        rows = encoder.encode(texts)
        seconds, segments = seconds + time.perf_counter() - start, segments + len(texts)
        queries = encoder.encode([q.text for q in questions], query=True)
        topics, active, before = cluster(rows, episodes), None, len(hits["alone"])
        centroids = np.stack([t.centroid for t in topics])
        owner = {s: t.id for t in topics for s in t.members}
        largest = max(topics, key=len).id
        for question, query in zip(questions, queries, strict=True):
            right = {owner[number // WINDOW] for number in question.evidence}
            covered, near = concordance.coverage(question.text), cosines(centroids, query)
            active = route(query, covered, rows, topics, active, floor=floor).topic
            hits["turns"].append(active in right)
            hits["alone"].append(route(query, covered, rows, topics, floor=-1.0).topic in right)
            nearest = np.argsort(-cosines(rows, query), kind="stable")[:VOTERS]
            votes = Counter(owner[int(s)] for s in nearest)
            hits["vote"].append(max(votes, key=lambda t: (votes[t], near[t])) in right)
            hits["words"].append(owner[int(covered.argmax())] in right)
            hits["centroid"].append(topics[int(near.argmax())].id in right)
            hits["chance"].append(len(right) / len(topics))
            hits["largest"].append(largest in right)
        each[dialogue.name] = float(np.mean(hits["alone"][before:]))
    rates = {way: float(np.mean(found)) for way, found in hits.items()}
    return {
        "encoder": encoder.name, "episodes": episodes, "questions": len(hits["alone"]), "segments": segments,
        "ms_per_segment": 1e3 * seconds / max(1, segments), **rates, "each": each,
    }  # fmt: skip


def run(
    encoders: Sequence[Encoder],
    sets: dict[str, Sequence[Dialogue]],
    counts: Sequence[int | None] = (2, EPISODES, 6, 8, None),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Hit rates for every encoder, set of dialogues and number of episodes, and whether the rule is as good as it should be.

    Without a number, None, a conversation has as many episodes as its length asks for.
    Sets named "locomo" have labelled questions of people; of others the rates are reported only.
    """
    rows, checks = [], []
    for encoder in encoders:
        for name, dialogues in sets.items():
            known = _Remembered(encoder)
            for count in counts:
                row = {"set": name, **hit_rates(known, dialogues, count)}
                found = f"alone {row['alone']:.3f}, turns {row['turns']:.3f}"
                say(f"{name}, {encoder.name}, {count or 'their own number of'} episodes: {found}")
                rows.append(row)
                if name == "locomo" and count == EPISODES and encoder.name in WANTED:
                    title = f"routing hits, {encoder.name}, {count} episodes"
                    checks.append(check(title, row["alone"], WANTED[encoder.name], "share", False))
            for row in rows[-len(counts) :]:
                row["ms_per_segment"] = rows[-len(counts)]["ms_per_segment"]
    return {"rows": rows, "checks": checks}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{'set':10s} {'encoder':10s} episodes  questions  {'  '.join(f'{w:>8s}' for w in WAYS)}  ms/segment"
    ]
    for r in result["rows"]:
        rates = "  ".join(f"{r[way]:8.3f}" for way in WAYS)
        lines.append(
            f"{r['set']:10s} {r['encoder']:10s} {r['episodes'] or 'own':>8}  {r['questions']:9d}  {rates}"
            f"  {r['ms_per_segment']:10.1f}"
        )
    return "\n".join(lines)


class _Remembered:
    """An encoder that reads no text twice."""

    def __init__(self, encoder: Encoder) -> None:
        self.name, self.dims, self._encoder = encoder.name, encoder.dims, encoder
        self._rows: dict[tuple[bool, str], np.ndarray] = {}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return self._encoder.lengths(texts)

    def encode(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if (query, text) not in self._rows]:
            rows = self._encoder.encode(new, query)
            self._rows |= {(query, text): row for text, row in zip(new, rows, strict=True)}
        return np.array([self._rows[query, text] for text in texts]).reshape(-1, self.dims)

"""Ways to score cached rows, all of one interface: the patched prompt of an episode, and what it is compared with.

Every prompt scores alike, by the attention it pays; they differ in what is read. Sinks are pinned for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.line import Line
from agentmem.episode.passes import Scores

WINDOW = 64
"""Tokens at the end of a block that SnapKV scores by."""
CATALYST = "Summarize the previous context highlighting the most important parts."
REPEAT_FIRST = "Repeat the previous context exactly."
REPEAT = "Repeat the part of the previous context exactly, starting with"


class Policy(Protocol):
    """`reach`: tokens behind the last one that it reads at most, for a block of some length."""

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        """Scores of every row but the pinned ones, after `block` has been read as the last tokens of `held`."""
        ...

    def reach(self, block: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Prompted:
    """Rows that one prompt looks at: an episode's patched prompt (EpiCache), InfiniPot's catalyst, or the question itself."""

    prompt: tuple[int, ...]

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        return held.score(self.prompt)

    def reach(self, block: int) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class SnapKV:
    """Rows that the last tokens of the block look at, read once more behind it (SnapKV as EpiCache measures it)."""

    window: int = WINDOW

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        return held.score(block[-self.window :])

    def reach(self, block: int) -> int:
        return min(block, self.window)


@dataclass(frozen=True, slots=True)
class KVzip:
    """Rows that repeating the block takes (KVzip, arXiv 2505.23416): `repeat` asks for it, the block is what is said then.

    Blocks longer than `piece` are repeated piece by piece, and the best score counts.
    """

    repeat: tuple[int, ...]
    piece: int = 2048

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        best: Scores | None = None
        for start in range(0, len(block), self.piece):
            found = held.score([*self.repeat, *block[start : start + self.piece]])
            best = found if best is None else _higher(best, found)
        assert best is not None
        return best

    def reach(self, block: int) -> int:
        return len(self.repeat) + min(block, self.piece)


@dataclass(frozen=True, slots=True)
class Streaming:
    """The newest rows (StreamingLLM), at the positions they were read at."""

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        return [[p.astype(np.float32) for p in line.candidate_positions()] for line in held.lines]

    def reach(self, block: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class KeyDiff:
    """Rows whose keys are least like the others of their head: minus the cosine to the mean of all unit keys (KeyDiff)."""

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        return [_unlike(line) for line in held.lines]

    def reach(self, block: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Random:
    """Any rows. A row's score depends on its layer, head and position alone, so that what is kept does not change by chance."""

    seed: int = 0

    def score(self, held: Held, block: Sequence[int]) -> Scores:
        out = []
        for number, line in enumerate(held.lines):
            draws = np.random.default_rng([self.seed, number]).random((held.tokens, line.heads), np.float32)
            out.append([draws[p, h] for h, p in enumerate(line.candidate_positions())])
        return out

    def reach(self, block: int) -> int:
        return 0


def _unlike(line: Line) -> list[np.ndarray]:
    keys, _, visible = line.past(mx.float32)
    keys = line.kind.key_map.restored(keys[None])[0]
    unit = keys / mx.maximum(mx.linalg.norm(keys, axis=-1, keepdims=True), 1e-20)
    counted = unit if visible is None else mx.where(visible[..., None], unit, 0.0)
    anchor = counted.sum(axis=1, keepdims=True)
    anchor = anchor / mx.maximum(mx.linalg.norm(anchor, axis=-1, keepdims=True), 1e-20)
    return line.candidates(np.array(-(unit * anchor).sum(axis=-1)))


def _higher(one: Scores, other: Scores) -> Scores:
    return [[np.maximum(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]

"""What a prompt is made of: fixed text, and texts that may stand elsewhere too, found by their token ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from agentmem.compose.segment import text_hash
from agentmem.model.chat import ChatTokenizer

FIXED, BORDER, SYSTEM = "fixed", "border", "system"
SHORTEST = 16
"""Tokens of a text that is looked for within messages."""
TRIES = 64
"""Places at which the content of a message is looked for, and texts that may share their middle."""
_SHINGLE = SHORTEST - 2
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Span:
    """Content tokens of one message in a prompt.

    kind: "user", "assistant", "tool", "system", "document:NAME" or "slot:NAME". before, after: tokens beside it that share
    characters with it; what they are depends on the content.
    """

    start: int
    stop: int
    kind: str
    before: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `stop` of a prompt: fixed text, a border between two kinds of text, or what fills a slot.

    text, at: the known text that a slot holds, and its first token in it.
    """

    start: int
    stop: int
    kind: str
    text: bytes = b""
    at: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_slot(self) -> bool:
        return self.kind not in (FIXED, BORDER)


@dataclass(frozen=True, slots=True)
class Match:
    """A known text in a prompt, from its token `at` on: 0, or 1 where the first token differs."""

    start: int
    stop: int
    text: bytes
    kind: str
    at: int
    short: int

    @property
    def span(self) -> Span:
        return Span(self.start, self.stop, self.kind, self.at, self.short)


@dataclass(frozen=True, slots=True)
class _Known:
    """A text to look for. `middle` and `total`: sums of its middle and of all but its first and last token; 0 for short texts."""

    text: bytes
    ids: np.ndarray
    kind: str
    middle: int = 0
    total: int = 0


class Texts:
    """Known texts, found anywhere in a prompt but for a token at either end, which may have merged with its neighbour."""

    def __init__(self) -> None:
        self._texts: dict[bytes, _Known] = {}
        self._middles: dict[int, list[_Known]] = defaultdict(list)
        self._sorted: np.ndarray | None = None

    def __contains__(self, text: bytes) -> bool:
        return text in self._texts

    def kind(self, text: bytes) -> str | None:
        known = self._texts.get(text)
        return None if known is None else known.kind

    def add(self, text: bytes, ids: np.ndarray, kind: str) -> None:
        """`text` is the hash of `ids`; those that are too short are known as a whole only."""
        if text in self._texts:
            return
        if len(ids) < SHORTEST:
            self._texts[text] = _Known(text, ids, kind)
            return
        total = _Sums(ids[1:-1]).of(0, len(ids) - 2)
        known = self._texts[text] = _Known(text, ids, kind, _middle(ids), total)
        self._middles[known.middle].append(known)
        self._sorted = None

    def remove(self, text: bytes) -> None:
        known = self._texts.pop(text, None)
        if known is None or len(known.ids) < SHORTEST:
            return
        self._middles[known.middle] = [k for k in self._middles[known.middle] if k.text != text]
        if not self._middles[known.middle]:
            del self._middles[known.middle]
        self._sorted = None

    def find(self, ids: np.ndarray, within: Sequence[Span]) -> list[Match]:
        """The texts that lie in one of these spans each, none across another, the longest first chosen; in order."""
        if not self._middles or len(ids) < SHORTEST:
            return []
        if self._sorted is None:
            self._sorted = np.array(sorted(self._middles), dtype=np.uint64)
        search = _Search(ids, within)
        seen = search.middles_of(self._sorted)
        found = [known for middle in seen for known in self._middles[middle][-TRIES:]]
        for known in sorted(found, key=lambda k: -len(k.ids)):
            search.take(known)
        return sorted(search.matches, key=lambda m: m.start)


class _Search:
    """One prompt that is looked through. `limit`: for each token the end of the span that it is in, or 0."""

    def __init__(self, ids: np.ndarray, within: Sequence[Span]) -> None:
        self.ids, self.matches = ids, list[Match]()
        self._sums = _Sums(ids)
        self._windows = self._sums.windows(_SHINGLE)
        self._limit = np.zeros(len(ids) + 1, dtype=np.int64)
        for span in within:
            self._limit[span.start : span.stop] = span.stop
        self._taken = np.zeros(len(ids), dtype=bool)

    def middles_of(self, known: np.ndarray) -> list[int]:
        """Which of these sums of middles, sorted, are in the prompt."""
        places = np.minimum(np.searchsorted(known, self._windows), len(known) - 1)
        self._hits = np.flatnonzero(known[places] == self._windows)
        return [int(m) for m in np.unique(self._windows[self._hits])]

    def take(self, known: _Known) -> None:
        """Match this text from left to right wherever nothing longer is."""
        starts, stops, heads, shorts = self._places(known)
        number = 0
        while number < len(starts):
            start, stop, head = int(starts[number]), int(stops[number]), int(heads[number])
            # A sum is a hint, ids are the truth.
            if np.array_equal(self.ids[start:stop], known.ids[head : head + stop - start]):
                match = Match(start, stop, known.text, known.kind, head, int(shorts[number]))
                self.matches.append(match)
                self._taken[start:stop] = True
                number = int(np.searchsorted(starts, stop))
            else:
                number += 1

    def _places(self, known: _Known) -> tuple[np.ndarray, ...]:
        """Where sums say that the text is: first and last token of each place, and how many of its own miss at either end."""
        n, inner = len(self.ids), len(known.ids) - 2
        first = self._hits[self._windows[self._hits] == known.middle] - _offset(len(known.ids))
        first = first[(first >= 0) & (first + inner <= n)]
        first = first[self._sums.each(first, inner) == np.uint64(known.total)]
        limit, end = self._limit[first], first + inner
        before, behind = np.maximum(first - 1, 0), np.minimum(end, n - 1)
        head = (first == 0) | (self.ids[before] != known.ids[0]) | (self._limit[before] != limit)
        short = (end == n) | (self.ids[behind] != known.ids[-1]) | (self._limit[behind] != limit)
        start, stop = first - 1 + head, end + 1 - short
        taken = np.concatenate([[0], np.cumsum(self._taken)])
        free = (limit >= stop) & (taken[start] == taken[stop])
        return start[free], stop[free], head[free], short[free]


class _Sums:
    """Sums of token ids over any stretch, the same for the same ids wherever they stand."""

    def __init__(self, ids: np.ndarray) -> None:
        powers = np.full(len(ids), _BASE, dtype=np.uint64)
        back = np.full(len(ids) + 1, _INVERSE, dtype=np.uint64)
        powers[:1], back[:1] = 1, 1
        self._back = np.cumprod(back, dtype=np.uint64)
        terms = (ids.astype(np.uint64) + np.uint64(1)) * np.cumprod(powers, dtype=np.uint64)
        self._total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])

    def of(self, start: int, length: int) -> int:
        apart = int(self._total[start + length]) - int(self._total[start])
        return apart * int(self._back[start]) & _MASK

    def each(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The same from each of these tokens on: uint64 [k]."""
        return (self._total[starts + length] - self._total[starts]) * self._back[starts]

    def windows(self, length: int) -> np.ndarray:
        """Of every stretch of this length: uint64 [n - length + 1]."""
        apart = self._total[length:] - self._total[:-length]
        return apart * self._back[: len(apart)]


def _offset(length: int) -> int:
    """Where the middle of a text begins within its inner tokens: beginnings are often alike."""
    return (length - 2 - _SHINGLE) // 2


def _middle(ids: np.ndarray) -> int:
    at = 1 + _offset(len(ids))
    return _Sums(ids[at : at + _SHINGLE]).of(0, _SHINGLE)


def parts_of(ids: np.ndarray, spans: Sequence[Span], texts: Texts) -> list[Part]:
    """The prompt from end to end: fixed text, then slot after slot with fixed text, maybe of no tokens, between them.

    A span whose ids are known is a slot; otherwise the known texts in it are; without any the whole span is an unknown one,
    but for system prompts, which are fixed. Precondition: spans do not overlap.
    """
    spans = sorted((s for s in spans if s.stop > s.start), key=lambda s: s.start)
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    whole = [_whole(ids, span, texts) for span in spans]
    open_spans = [s for s, part in zip(spans, whole, strict=True) if part is None]
    inner: dict[Span, list[Match]] = defaultdict(list)
    starts = np.array([s.start for s in open_spans], dtype=np.int64)
    for match in texts.find(ids, open_spans):
        inner[open_spans[int(np.searchsorted(starts, match.start, side="right")) - 1]].append(match)
    slots: list[tuple[Span, Part]] = []
    for span, part in zip(spans, whole, strict=True):
        if part is not None:
            slots.append((span, part))
        else:
            slots += _slots(span, inner[span])
    return list(_laid_out(slots, len(ids)))


def _whole(ids: np.ndarray, span: Span, texts: Texts) -> Part | None:
    text = text_hash(ids[span.start : span.stop])
    kind = texts.kind(text)
    if kind is None:
        return None
    return Part(span.start, span.stop, kind if kind.startswith("document:") else span.kind, text)


def _slots(span: Span, matches: list[Match]) -> list[tuple[Span, Part]]:
    """The slots of a span that is not known as a whole."""
    if span.kind.startswith("slot:"):  # declared: all of it is one text, but for a token at either end
        matches = [m for m in matches if m.start - span.start <= m.at and span.stop - m.stop <= m.short]
    if not matches and span.kind != SYSTEM:
        return [(span, Part(span.start, span.stop, span.kind))]
    return [(m.span, Part(m.start, m.stop, m.kind, m.text, m.at)) for m in matches]


def _laid_out(slots: Sequence[tuple[Span, Part]], length: int) -> Iterator[Part]:
    at, after = 0, 0
    for span, part in slots:
        yield from _between(at, part.start, after, span.before)
        yield part
        at, after = part.stop, span.after
    if at < length or not slots:
        yield from _between(at, length, after, 0)


def _between(start: int, stop: int, after: int, before: int) -> Iterator[Part]:
    """Fixed text and the borders to its neighbours; the fixed text may have no tokens."""
    a = min(start + after, stop)
    b = max(stop - before, a)
    if a > start:
        yield Part(start, a, BORDER)
    yield Part(a, b, FIXED)
    if stop > b:
        yield Part(b, stop, BORDER)


def chain(ids: np.ndarray, parts: Sequence[Part]) -> list[bytes]:
    """For each part the hash of all fixed text up to and with it; borders depend on the content and do not count."""
    out, key = [], b""
    for part in parts:
        if part.kind == FIXED:
            key = xxhash.xxh3_128_digest(key + text_hash(ids[part.start : part.stop]))
        out.append(key)
    return out


def spans_of(messages: Sequence[dict[str, Any]], ids: Sequence[int], tokenizer: ChatTokenizer) -> list[Span]:
    """Tokens that lie wholly inside each message's content, for a chat prompt of any template. In order, none overlap.

    Contents are looked for in the text of `ids`, one behind the other; what the template left out or changed has no span.
    """
    prompt = Characters(ids, tokenizer)
    found, at = [], 0
    for message in messages:
        content = _content(message)
        for wanted in (content, content.strip()):
            start = prompt.place(wanted.encode(errors="replace"), at)
            if start is None:
                continue
            at = start + len(wanted.encode(errors="replace"))
            span = prompt.span(start, at, str(message.get("role", "user")))
            if span is not None:
                found.append(span)
            break
    return found


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = [p.get("text") for p in content or () if isinstance(p, dict) and p.get("type") == "text"]
    return "".join(t for t in texts if isinstance(t, str))


class Characters:
    """The bytes of a prompt and the tokens that they belong to."""

    def __init__(self, ids: Sequence[int], tokenizer: ChatTokenizer) -> None:
        pieces = [tokenizer.piece(int(token)) for token in ids]
        self.text = b"".join(pieces)
        self._edges = np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)])
        self._marks = tuple(text.encode() for text in tokenizer.special.values())

    def place(self, wanted: bytes, at: int) -> int | None:
        """Where `wanted` begins, from `at` on. A place with a special token behind it is best: no role has its name there."""
        if not wanted.strip():
            return None
        first = start = self.text.find(wanted, at)
        for _ in range(TRIES):
            if start < 0:
                break
            if self._ends(start + len(wanted)):
                return start
            start = self.text.find(wanted, start + 1)
        return first if first >= 0 else None

    def _ends(self, at: int) -> bool:
        rest = self.text[at : at + 256].lstrip()
        return not rest or rest.startswith(self._marks)

    def span(self, start: int, stop: int, kind: str) -> Span | None:
        """The tokens wholly inside these bytes; None where there are none."""
        first = int(np.searchsorted(self._edges, start, side="left"))
        last = int(np.searchsorted(self._edges, stop, side="right")) - 1
        if last <= first:
            return None
        return Span(first, last, kind, int(self._edges[first] > start), int(self._edges[last] < stop))

    def bytes_of(self, span: Span) -> tuple[int, int]:
        """Where the tokens of a span lie."""
        return int(self._edges[span.start]), int(self._edges[span.stop])

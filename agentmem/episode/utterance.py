"""What was said, one utterance after the other, and where it stands in the agent's log."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

LONG = 500
"""A reply of more characters is taken apart (EpiCache, section 3.1)."""
FRAGMENT = 10
"""Characters up to which a part of a reply says nothing of its own."""
HEADER = 64
"""Bytes between two contents that a chat template may write."""
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool", "function": "Tool"}
_BORDER = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+|(?<=[\u3002\uff01\uff1f])|\n\s*\n\s*")
_UNFINISHED = re.compile(
    r"(?:(?:^|\W)(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|cf|approx|Fig|Eq|e\.g|i\.e)|(?:^|\n)\s*\d+)\.$",
    re.IGNORECASE,
)


class Pieces(Protocol):
    """What is asked of a tokenizer; see `agentmem.model.chat.ChatTokenizer`."""

    eos_ids: frozenset[int]

    def piece(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Utterance:
    """`text` as it was said by `speaker`; tokens [start, stop) of the agent's log, (0, 0) where there is none."""

    speaker: str
    text: str
    start: int = 0
    stop: int = 0


def utterances_of(messages: Iterable[Mapping[str, Any]]) -> list[Utterance]:
    """Chat messages to utterances: a long reply is one for each of its sentences; system messages say nothing."""
    said = []
    for message in messages:
        role, text = str(message.get("role")), _text(message.get("content"))
        if role not in SPEAKERS or not text:
            continue
        parts = sentences(text) if role == "assistant" and len(text) > LONG else [text]
        said += [Utterance(SPEAKERS[role], part) for part in parts]
    return said


def spoken(log: Iterable[tuple[str, str]]) -> list[Utterance]:
    """A log of (speaker, text) to utterances, one each."""
    return [Utterance(speaker, text.strip()) for speaker, text in log if text.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a text that have more than ten characters, in order; the whole text where none has."""
    found, start = [], 0
    for border in _BORDER.finditer(text):
        if border.end() == start or _UNFINISHED.search(text[start : border.start()]):
            continue
        found.append(text[start : border.end()].strip())
        start = border.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if len(sentence) > FRAGMENT] or [text]


def located(utterances: Sequence[Utterance], ids: Sequence[int], tokenizer: Pieces) -> list[Utterance]:
    """The utterances with their token ranges in `ids`, the log as the chat template wrote it.

    The ranges follow one another without gaps and cover the log: what is written before a text, a header or the system's
    message, counts to it, and so does the token that ends its turn. An utterance that cannot be found has an empty range.
    """
    if not utterances:
        return []
    pieces = [tokenizer.piece(token) for token in ids]
    ends = [0, *accumulate(map(len, pieces))]
    log = b"".join(pieces)
    closing = {tokenizer.piece(token) for token in tokenizer.eos_ids} - {b""}
    out, at, start = [], 0, 0
    for utterance in utterances:
        at = _behind(log, utterance.text.encode("utf-8", "replace"), at, closing)
        stop = max(start, bisect_left(ends, at))
        while stop < len(ids) and at and (ids[stop] in tokenizer.eos_ids or not pieces[stop].strip()):
            stop += 1
        out.append(replace(utterance, start=start, stop=stop))
        start, at = stop, max(at, ends[stop])
    return [*out[:-1], replace(out[-1], stop=len(ids))]


def _behind(log: bytes, text: bytes, at: int, closing: set[bytes]) -> int:
    """The byte behind `text`, looked for from `at` on; `at` where it is not found.

    A text that ends a turn wins over the same letters in the header before it.
    """
    first = log.find(text, at)
    if first < 0:
        return at
    ended = (log.find(text + end, first, first + HEADER + len(text + end)) for end in closing)
    return min((hit for hit in ended if hit >= 0), default=first) + len(text)


def _text(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "\n".join(part for part in parts if isinstance(part, str)).strip()
    return ""

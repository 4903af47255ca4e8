"""The canonical tokens of a session: what the model saw and sampled, and how a client's text lines up with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from agentmem.blockpool.index import TurnRow

Kind = Literal["prompt", "reply", "end"]


class Tokenizer(Protocol):
    """What a conversation needs of a tokenizer; see `agentmem.model.chat.ChatTokenizer`."""

    special: dict[int, str]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Span(NamedTuple):
    """A stretch of the session: rendered prompt text, a reply as the client saw it, or the token that ended a reply."""

    kind: Kind
    text: str
    ids: list[int]


class Alignment(NamedTuple):
    """A new prompt over the old session: the first `keep` ids stand, `text` is new and was tokenised to `ids`."""

    keep: int
    text: str
    ids: list[int]


class Conversation:
    """Spans and messages of one session. A log that was taken over is replayed when they are first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spans: list[Span] = []
        self._ids: list[int] = []
        self._messages: list[dict[str, Any]] = []
        self._log: deque[tuple[TurnRow, bool]] = deque()
        self.turns = 0
        self.length = 0

    @property
    def spans(self) -> list[Span]:
        self._replay()
        return self._spans

    @property
    def messages(self) -> list[dict[str, Any]]:
        self._replay()
        return self._messages

    @property
    def ids(self) -> list[int]:
        """All token ids, those without state (an end-of-turn token that was sampled last) too; `length` of them."""
        self._replay()
        return self._ids.copy()

    def align(self, text: str) -> Alignment:
        """Line the rendered prompt `text` up with the session.

        Where a message's text equals ours, our ids stand, however the model had split it into tokens. Only what follows is
        tokenised, from a special token on, so that no token depends on text before the cut and no second BOS appears.
        """
        keep, at = self._matching(text)
        suffix = text[at:]
        return Alignment(keep, suffix, self._tokenizer.encode(suffix))

    def align_ids(self, ids: list[int]) -> Alignment:
        """Line a prompt of token ids up with the session: as far as the ids are the same."""
        kept = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
        keep = min(len(ids), self.length) if kept is None else kept
        return Alignment(keep, self._tokenizer.decode(ids[keep:]), ids[keep:])

    def _matching(self, text: str) -> tuple[int, int]:
        """(tokens, characters of `text`) of the longest stand that ends at a special token."""
        ends, differing = [(0, 0)], None
        for i, span in enumerate(self.spans):
            keep, at = ends[-1]
            length = self._span_match(i, text, at)
            if length is None:
                differing = span
                break
            ends.append((keep + len(span.ids), at + length))
        if differing is not None and (within := self._anchor(differing, text, ends[-1][1])):
            return ends[-1][0] + within[0], ends[-1][1] + within[1]
        # From the end, where the stand mostly is: a long conversation has thousands of tokens to look through.
        for i in range(len(ends) - 1, 0, -1):
            (keep, at), span = ends[i - 1], self.spans[i - 1]
            if self._clean(text, ends[i][1]):
                return ends[i]
            if anchor := self._anchor(span, text, at):
                return keep + anchor[0], at + anchor[1]
        return 0, 0

    def _span_match(self, i: int, text: str, at: int) -> int | None:
        """Characters of `text` from `at` that equal span `i`; None when they differ.

        Chat templates trim replies, so a reply also matches without its outer white space.
        """
        span = self.spans[i]
        if text.startswith(span.text, at):
            return len(span.text)
        trimmed = span.text.strip()
        if span.kind == "reply" and text.startswith(trimmed, at) and self._clean(text, at + len(trimmed)):
            return len(trimmed)
        return None

    def _clean(self, text: str, at: int) -> bool:
        """True where tokenisation can start afresh: a special token begins or ends at `at`."""
        return any(
            text.startswith(s, at) or text.endswith(s, 0, at) for s in self._tokenizer.special.values()
        )

    def _anchor(self, span: Span, text: str, at: int) -> tuple[int, int] | None:
        """(tokens, characters) of the span up to the end of its last special token that `text` shares; None without one."""
        if span.kind == "reply":
            return None
        shared = _common_characters(span.text, text[at : at + len(span.text)])
        found, position = None, 0
        for n, token in enumerate(span.ids):
            special = self._tokenizer.special.get(token)
            if special is None:
                continue
            position = span.text.find(special, position)
            if position < 0 or position + len(special) > shared:
                break
            position += len(special)
            found = (n + 1, position)
        return found

    def begin(self, alignment: Alignment) -> None:
        """Drop what the alignment does not keep, and add its prompt."""
        self.truncate(alignment.keep)
        if alignment.ids:
            self.add([Span("prompt", alignment.text, alignment.ids)])

    def add(self, spans: list[Span]) -> None:
        """What follows."""
        for span in spans:
            self._spans.append(span)
            self._ids += span.ids
        self.length = len(self._ids)

    def truncate(self, keep: int) -> None:
        """Keep the first `keep` ids. A span is only ever cut behind one of its special tokens."""
        self._replay()
        self._cut(keep)
        self.length = len(self._ids)

    def _cut(self, keep: int) -> None:
        spans, self._spans = self._spans, []
        del self._ids[keep:]
        for span in spans:
            if keep >= len(span.ids):
                self._spans.append(span)
            elif keep:
                self._spans.append(Span(span.kind, self._tokenizer.decode(span.ids[:keep]), span.ids[:keep]))
            keep -= min(keep, len(span.ids))

    def apply(self, turn: TurnRow, *, tokens: bool = True) -> None:
        """Take over one entry of the token log. Without `tokens` only its messages: another tokenizer made its ids."""
        self._log.append((turn, tokens))
        self.turns = turn.n
        self.length = min(turn.keep_tokens, self.length) + len(turn.ids) if tokens else 0

    def _replay(self) -> None:
        while self._log:
            turn, tokens = self._log.popleft()
            self._messages = [*self._messages[: turn.keep_messages], *turn.messages]
            if not tokens:
                continue
            self._cut(turn.keep_tokens)
            at = 0
            for kind, n, text in turn.spans:
                ids = [int(t) for t in turn.ids[at : at + n]]
                self._spans.append(Span(kind, self._tokenizer.decode(ids) if text is None else text, ids))
                self._ids += ids
                at += n

    def record(self, alignment: Alignment, added: list[Span], messages: list[dict[str, Any]]) -> TurnRow:
        """Add a turn and return its log entry (without stats and time). Text that decodes from its ids is not logged twice."""
        keep = min(alignment.keep, len(self.ids))
        self.begin(alignment)
        self.add(added)
        spans = ([Span("prompt", alignment.text, alignment.ids)] if alignment.ids else []) + added
        kept = _common_messages(self.messages, messages)
        row = TurnRow(
            n=self.turns + 1,
            keep_tokens=keep,
            keep_messages=kept,
            ids=np.array([t for s in spans for t in s.ids], dtype=np.int32),
            spans=[
                [s.kind, len(s.ids), None if self._tokenizer.decode(s.ids) == s.text else s.text]
                for s in spans
            ],
            messages=messages[kept:],
            stats={},
            created=0.0,
        )
        self._messages, self.turns = list(messages), row.n
        return row


def _common_characters(a: str, b: str) -> int:
    if a == b:
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _common_messages(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n

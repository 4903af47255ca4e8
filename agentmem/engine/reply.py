"""A reply as it grows: text that may be shown, stop strings, and which tokens count."""

from __future__ import annotations

from typing import Protocol

from agentmem.engine.request import Logprobs, TokenLogprob


class Detokenizer(Protocol):
    """Streaming decoder; see `agentmem.model.chat.Detokenizer`."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Reply:
    """Text of one reply. Text that could be the start of a stop string is held back until it is decided; `stop` is the one found.

    Log probabilities belong to tokens and come out with the text of theirs: none are shown of text that is not.
    """

    def __init__(self, detokenizer: Detokenizer, stop: list[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = [s for s in stop if s]
        self._ends: list[int] = []
        self.tokens: list[int] = []
        self.text = ""
        self._shown = 0
        self._logprobs: list[TokenLogprob] = []
        self._released = 0
        self._over = False
        self.stopped = False
        self.stop: str | None = None

    def add(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Take a token; returns text to show now. Sets `stopped` when a stop string is complete.

        Either all tokens come with a log probability, or none.
        """
        before = len(self.text)
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self.text += self._detokenizer.add(token)
        self._ends.append(len(self.text))
        self._find_stop(before)
        return self._show(len(self.text) if self.stopped else len(self.text) - self._undecided())

    def finish(self) -> str:
        """The rest of the text that may be shown."""
        if not self.stopped:
            before = len(self.text)
            self.text += self._detokenizer.finish()
            self._find_stop(before)
        self._over = True
        return self._show(len(self.text))

    def release(self) -> Logprobs:
        """Log probabilities of the tokens whose text has been shown since the last call, without those cut off by a stop."""
        known, first = len(self._logprobs), self._released
        while self._released < known and self._is_shown(self._released):
            self._released += 1
        return tuple(self._logprobs[first : self._released])

    def released(self) -> Logprobs:
        """All that `release` has returned."""
        return tuple(self._logprobs[: self._released])

    def kept(self) -> int:
        """How many of the tokens lie wholly in the shown text."""
        return sum(end <= len(self.text) for end in self._ends) if self.stopped else len(self.tokens)

    def kept_text(self) -> str:
        """Text of the kept tokens."""
        n = self.kept()
        return self.text if n == len(self.tokens) else self.text[: self._ends[n - 1] if n else 0]

    def _find_stop(self, before: int) -> None:
        starts = [(self.text.find(s, max(0, before - len(s) + 1)), s) for s in self._stop]
        found = [(i, s) for i, s in starts if i >= 0]
        if found:
            at, self.stop = min(found)
            self.text, self.stopped = self.text[:at], True

    def _is_shown(self, i: int) -> bool:
        """Whether the text of token `i` has been shown; one with a part of a character waits for the rest of it."""
        start, end = self._ends[i - 1] if i else 0, self._ends[i]
        if self._over:
            return not self.stopped or start < len(self.text) or end <= len(self.text)
        return end <= self._shown and (start < end or end < self._shown)

    def _undecided(self) -> int:
        longest = 0
        for s in self._stop:
            for n in range(min(len(s) - 1, len(self.text)), longest, -1):
                if self.text.endswith(s[:n]):
                    longest = n
                    break
        return longest

    def _show(self, end: int) -> str:
        part = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return part

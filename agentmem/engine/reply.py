"""A reply as it grows: text that may be shown, stop strings, and which tokens count."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Streaming decoder; see `agentmem.model.chat.Detokenizer`."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Reply:
    """Text of one reply. Text that could be the start of a stop string is held back until it is decided."""

    def __init__(self, detokenizer: Detokenizer, stop: list[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = [s for s in stop if s]
        self._ends: list[int] = []
        self.tokens: list[int] = []
        self.text = ""
        self._shown = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; returns text to show now. Sets `stopped` when a stop string is complete."""
        before = len(self.text)
        self.tokens.append(token)
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
        return self._show(len(self.text))

    def kept(self) -> int:
        """How many of the tokens lie wholly in the shown text."""
        return sum(end <= len(self.text) for end in self._ends) if self.stopped else len(self.tokens)

    def kept_text(self) -> str:
        """Text of the kept tokens."""
        n = self.kept()
        return self.text if n == len(self.tokens) else self.text[: self._ends[n - 1] if n else 0]

    def _find_stop(self, before: int) -> None:
        starts = [self.text.find(s, max(0, before - len(s) + 1)) for s in self._stop]
        found = [i for i in starts if i >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

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

"""A reply that calls tools, taken apart: text to show and calls, piece by piece as the text comes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Parse = Callable[[str], Any]

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
"""A call in JSON up to its arguments, written in the usual order."""


class Marks(NamedTuple):
    """What stands around calls. An empty `end`: they go on to the end of the reply. An empty `start`: the whole reply is one."""

    start: str
    end: str


class TextPart(NamedTuple):
    """Text to show."""

    text: str


class CallPart(NamedTuple):
    """A call begins: the `number`-th of the reply, from 0."""

    number: int
    id: str
    name: str


class ArgumentsPart(NamedTuple):
    """More of the JSON of the arguments of call `number`."""

    number: int
    text: str


Part = TextPart | CallPart | ArgumentsPart


@dataclass(slots=True)
class Call:
    """A call as a client gets it; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """The shape of chat completions."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class CallReader:
    """Reads one reply. Arguments in JSON come out while they are said; calls in another notation when they are complete.

    What cannot be parsed is text. White space around calls belongs to nobody.
    """

    def __init__(self, marks: Marks, parse: Parse) -> None:
        self._marks, self._parse = marks, parse
        self._text = ""
        self._inside = False
        self._began: ArgumentStream | None = None
        self._shown = self._ended = False
        self._calls = 0

    def add(self, text: str) -> list[Part]:
        """What `text` completes."""
        self._text += text
        return list(self._advance(last=False))

    def finish(self) -> list[Part]:
        """The rest: the reply is over."""
        return list(self._advance(last=True))

    def _advance(self, last: bool) -> Iterator[Part]:
        while True:
            if self._inside:
                block = self._block(last)
                if block is None:
                    yield from self._partial()
                    return
                yield from self._called(block)
            else:
                at = self._start()
                if at < 0:
                    yield from self._outside(last)
                    return
                before, self._text = self._text[:at], self._text[at + len(self._marks.start) :]
                yield from self._show(before.rstrip())
                self._inside = True

    def _start(self) -> int:
        """Where the next call begins, or -1."""
        if self._marks.start:
            return self._text.find(self._marks.start)
        bare = self._text.lstrip()
        return len(self._text) - len(bare) if bare.startswith("{") and not self._shown else -1

    def _outside(self, last: bool) -> Iterator[Part]:
        """Show text that cannot be the beginning of a call, nor white space before one."""
        end = len(self._text)
        if not last:
            held = max(
                (n for n in range(1, len(self._marks.start)) if self._text.endswith(self._marks.start[:n])),
                default=0,
            )
            end -= held
            end = len(self._text[:end].rstrip())
        elif self._calls:
            end = len(self._text.rstrip())
        shown, self._text = self._text[:end], self._text[end:]
        yield from self._show(shown)

    def _show(self, text: str) -> Iterator[Part]:
        if self._calls and not self._shown:
            text = text.lstrip()
        if text:
            self._shown = True
            yield TextPart(text)

    def _block(self, last: bool) -> str | None:
        """The text of a call that is complete; None while it is not."""
        end = self._marks.end
        at = self._text.find(end) if end else -1
        self._ended = at >= 0
        if at >= 0:
            block, self._text = self._text[:at], self._text[at + len(end) :]
        elif last:
            block, self._text = self._text, ""
        else:
            return None
        self._inside = False
        return block

    def _partial(self) -> Iterator[Part]:
        """What can be said of a call that is not complete."""
        if self._began is None and (head := HEAD.match(self._text)):
            self._began = ArgumentStream(head.end())
            yield self._named(json.loads(f'"{head[1]}"'))
        if self._began is not None and (more := self._began.more(self._text)):
            yield ArgumentsPart(self._calls - 1, more)

    def _called(self, block: str) -> Iterator[Part]:
        """The calls of a complete block; its text as it stands where it is none."""
        began, self._began = self._began, None
        if began is None and (head := HEAD.match(block)) and self._parsed(block):
            began = ArgumentStream(head.end())
            yield self._named(json.loads(f'"{head[1]}"'))
        if began is not None:
            if more := began.more(block):
                yield ArgumentsPart(self._calls - 1, more)
            return
        calls = self._parsed(block)
        if not calls:
            yield from self._show(f"{self._marks.start}{block}{self._marks.end if self._ended else ''}")
        for name, arguments in calls:
            yield self._named(name)
            yield ArgumentsPart(self._calls - 1, arguments)

    def _named(self, name: str) -> CallPart:
        self._calls += 1
        return CallPart(self._calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _parsed(self, block: str) -> list[tuple[str, str]]:
        try:
            found = self._parse(block)
        except Exception:  # a model may say anything, and each parser fails in its own way
            return []
        calls = []
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                return []
            given = one.get("arguments", one.get("parameters", {}))
            calls.append((one["name"], given if isinstance(given, str) else json.dumps(given)))
        return calls


class ArgumentStream:
    """The JSON object that begins at `start` of a growing text, as far as it goes."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._quoted = self._escaped = self._over = False

    def more(self, text: str) -> str:
        """What of the object came since the last call."""
        begin = self._at
        while self._at < len(text) and not self._over:
            self._step(text[self._at])
            self._at += 1
        return text[begin : self._at]

    def _step(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = char == "\\", char != '"'
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._over = self._depth == 0


def taken_apart(text: str, marks: Marks, parse: Parse) -> tuple[str, list[Call]]:
    """A whole reply as its text and its calls."""
    reader = CallReader(marks, parse)
    shown, calls = "", []
    for part in [*reader.add(text), *reader.finish()]:
        if isinstance(part, TextPart):
            shown += part.text
        elif isinstance(part, CallPart):
            calls.append(Call(part.id, part.name, ""))
        else:
            calls[part.number].arguments += part.text
    return shown, calls

"""What a prompt that was read teaches: states of texts and fixed text that are new, anchors of texts that are known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx

from agentmem.compose.anchors import BASE_BITS
from agentmem.compose.assembly import Layout, segment_of
from agentmem.compose.library import Library
from agentmem.compose.packed import PackedState
from agentmem.compose.recognise import Part
from agentmem.compose.segment import Fixed, Held, Segment
from agentmem.compose.state import State

Look = Callable[[int, int], State]


class NotThere(Exception):
    """The run does not have the state of these tokens any more."""


@dataclass(slots=True)
class Lesson:
    """One prompt. `look(start, stop)` is what these tokens are in it; what it raises LookupError for is passed over.

    What is put on `in_use` stays in the library.
    """

    library: Library
    layout: Layout
    look: Look
    agent: str
    in_use: list[Held]
    _seen: dict[tuple[int, int], State] = field(default_factory=dict)

    def teach(self) -> None:
        slots = [(n, p) for n, p in enumerate(self.layout.parts) if p.is_slot]
        known = {n: found for n, p in slots if (found := self._known(p))}
        heard = set[str]()
        for number, part in slots:
            with suppress(NotThere):
                kept = known[number][0] if number in known else self._keep_segment(number, part)
                owners = kept.owners if kept is not None else {self.agent}
                heard = heard & owners if heard else set(owners)
            with suppress(NotThere):
                behind = self.layout.behind(number)
                fixed = self._keep_fixed(behind) if behind is not None else None
                if number in known and behind is not None:
                    self._observe(number, behind, *known[number], fixed, heard)

    def _known(self, part: Part) -> tuple[Segment, int] | None:
        """The segment in a slot and its first token there, if it is worth an anchor: offsets are from exact state."""
        found = segment_of(self.library, self.layout, part)
        if found is None or not found[0].provenance.exact:
            return None
        self.library.served(found[0], self.agent)
        self.in_use.append(found[0])
        return found

    def _state(self, part: Part) -> State:
        at = (part.start, part.stop)
        if at not in self._seen:
            try:
                self._seen[at] = self.look(*at)
            except LookupError as e:
                raise NotThere from e
        return self._seen[at]

    def _keep_segment(self, number: int, part: Part) -> Segment | None:
        base = PackedState.of(self._state(part), BASE_BITS)
        ids = self.layout.ids[part.start : part.stop].copy()
        segment = Segment(ids, base, kind=part.kind, home=self.layout.keys[number])
        kept = self.library.put(self.layout.namespace, segment, self.agent)
        self.in_use += [kept] if kept is not None else []
        return kept

    def _keep_fixed(self, number: int) -> Fixed | None:
        part, key = self.layout.parts[number], self.layout.keys[number]
        fixed = self.library.fixed(self.layout.namespace, key)
        if fixed is not None:
            self.library.served(fixed, self.agent)
        elif len(part):
            ids = self.layout.ids[part.start : part.stop].copy()
            new = Fixed(ids, PackedState.of(self._state(part), BASE_BITS))
            fixed = self.library.put_fixed(self.layout.namespace, key, new, self.agent)
        self.in_use += [fixed] if fixed is not None else []
        return fixed

    def _observe(
        self, number: int, behind: int, segment: Segment, at: int, fixed: Fixed | None, heard: set[str]
    ) -> None:
        """Make an anchor, unless there is one. State of this very slot says nothing of how others change in it.

        heard: the agents that have all that the slot hears, and its text.
        """
        part, key = self.layout.parts[number], self.layout.keys[behind]
        text = segment.piece_text(at, at + len(part))
        if segment.home == self.layout.keys[number] or self.library.anchor(self.layout.namespace, key, text):
            return
        base = segment.base.unpacked()[at : at + len(part)]
        offset = self._state(part) - base
        after = State(mx.zeros((1, base.rows.shape[1])), base.shapes)
        if fixed is not None:
            after = self._state(self.layout.parts[behind]) - fixed.base.unpacked()
        self.library.observe(
            self.layout.namespace, key, segment, text, base, offset, after, self.agent, heard
        )

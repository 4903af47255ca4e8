"""An agent's prompt as fixed text around slots, whose content changes from request to request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from agentmem.compose.planners import Piece
from agentmem.compose.prompt import Prompt
from agentmem.compose.state import State
from agentmem.errors import BadRequest
from agentmem.model.chat import ChatTokenizer

MARK = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True)
class Filling:
    """What stands in a slot: its ids and their state in the canonical frame, out of another context."""

    ids: tuple[int, ...]
    base: State

    @property
    def text(self) -> bytes:
        """The same for the same ids."""
        return xxhash.xxh3_128_digest(",".join(map(str, self.ids)).encode())


@dataclass(frozen=True, slots=True)
class Template:
    """`fixed` text, one more than there are `slots`, tokenised run by run: ids of a slot are then the same wherever it stands.

    bases: the state of the fixed text, out of a prompt that has the names of the slots in their places (as KVCOMM does it).
    """

    fixed: tuple[tuple[int, ...], ...]
    slots: tuple[str, ...]
    bases: tuple[State, ...]

    @classmethod
    def read(cls, text: str, tokenizer: ChatTokenizer, prompt: Prompt) -> Template:
        """A template of rendered `text` with slots like {{question}}; `prompt`, empty, reads it once.

        Raises BadRequest for slots without text before, between and behind them.
        """
        parts = MARK.split(text)
        runs, slots = parts[::2], parts[1::2]
        if not all(run.strip() for run in runs):
            raise BadRequest(
                "a template needs text in front of, between and behind its slots", param="template"
            )
        fixed = [tuple(tokenizer.encode(run)) for run in runs]
        names = [tuple(tokenizer.encode(slot)) for slot in slots]
        spans, ids = [], list[int]()
        for number, run in enumerate(fixed):
            spans.append((len(ids), len(ids) + len(run)))
            ids += run + (names[number] if number < len(names) else ())
        prompt.read(ids)
        return cls(tuple(fixed), tuple(slots), tuple(prompt.state(*span) for span in spans))

    def pieces(self, fillings: Mapping[str, Filling]) -> list[Piece]:
        """The prompt with these texts in its slots."""
        out = [Piece(self.fixed[0], self.bases[0])]
        for number, slot in enumerate(self.slots):
            filling = fillings[slot]
            out.append(Piece(filling.ids, filling.base, slot, filling.text))
            out.append(Piece(self.fixed[number + 1], self.bases[number + 1]))
        return out


def encoded(prompt: Prompt, carrier: Sequence[int], ids: Sequence[int]) -> Filling:
    """A text read on its own behind a `carrier`, which is what attention's sink needs; `prompt` is empty."""
    prompt.read([*carrier, *ids])
    return Filling(tuple(ids), prompt.state(len(carrier), len(prompt)))

"""Agents that talk in rounds over a tiny model: prompts composed where they can be, and learned from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from agentmem.compose import planners
from agentmem.compose.blend import mend
from agentmem.compose.composer import EXACT, Composer, Composition, Policy, Span, spans_of
from agentmem.compose.library import Library
from agentmem.compose.planners import Blend, Steps
from agentmem.compose.prompt import Prompt
from tests.compose.prompts import Stage

ROOM = 1 << 28
COMPOSED = Policy("composed", minimum=2)


@dataclass
class Turn:
    """One answered prompt."""

    ids: list[int]
    spans: list[Span]
    reply: str
    logits: mx.array
    made: Composition | None


@dataclass
class Round:
    """A composer over a stage's model."""

    stage: Stage
    library: Library = field(default_factory=lambda: Library(ROOM, ROOM))
    policy: Policy = COMPOSED
    composer: Composer = field(init=False)

    def __post_init__(self) -> None:
        self.composer = Composer(self.library, self.stage.model.tokenizer)

    def turn(
        self, agent: str, system: str, *said: str, namespace: str = "home", known: int = 0, tokens: int = 24,
        policy: Policy | None = None,
    ) -> Turn:  # fmt: skip
        """Messages of user and assistant in turn, answered; the composer learns from it."""
        tokenizer = self.stage.model.tokenizer
        roles = ("user", "assistant")
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
        messages += [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
        ids = tokenizer.encode(tokenizer.render(messages))
        spans = spans_of(messages, ids, tokenizer)
        made = self.composer.plan(namespace, ids, spans, known, policy or self.policy, agent)
        prompt = self.stage.prompt()
        if made is None:
            logits = prompt.read(ids)
        else:
            if known:
                prompt.read(ids[:known])
            logits = self._follow(prompt, made.steps)
        assert prompt.ids == ids
        reply = self._answer(prompt, logits, tokens)
        heard = [*spans, Span(len(ids), len(prompt), "assistant")]
        provenance = EXACT if made is None else made.provenance
        self.composer.learn(namespace, prompt.ids, heard, prompt.state, provenance, agent)
        self.library.check_integrity()
        return Turn(ids, spans, tokenizer.decode(reply), logits, made)

    def _follow(self, prompt: Prompt, steps: Steps) -> mx.array:
        """All is read in front of a blend, and behind it."""
        for number, step in enumerate(steps):
            if isinstance(step, Blend):
                if number:
                    planners.run(prompt, steps[:number])
                mend(self.stage.network, prompt, step)
                return planners.run(prompt, steps[number + 1 :])
        return planners.run(prompt, steps)

    def _answer(self, prompt: Prompt, logits: mx.array, tokens: int) -> list[int]:
        """A greedy reply, every token of which is read."""
        reply = []
        for _ in range(tokens):
            reply.append(int(logits.argmax()))
            logits = prompt.read(reply[-1:])
        return reply

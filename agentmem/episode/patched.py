"""The patched prompt of an episode: what its topic is about, in the form that shows which past tokens matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from agentmem.episode.segment import Segment

LIMIT = 1024
INSTRUCTION = (
    "Pick out what matters in this part of the conversation: who is speaking and what kind of person each one is, what "
    "happened and on which date or at what time, personal details, what was promised or planned, opinions, how people are "
    "related, moments of strong feeling, and experiences that nobody else has had."
)


class Chat(Protocol):
    """What is asked of a tokenizer; see `agentmem.model.chat.ChatTokenizer`."""

    def render(self, messages: list[dict[str, Any]], *, generation: bool = ...) -> str: ...

    def encode(self, text: str) -> list[int]: ...


def patched_prompt(
    tokenizer: Chat,
    segments: Sequence[Segment],
    limit: int = LIMIT,
    similarities: Sequence[float] | None = None,
) -> list[int]:
    """Token ids, `limit` at most, that follow a log as a transient continuation (EpiCache, section 3.1).

    The instruction ends a user's turn in the model's own chat template, and the segments are the reply, in the order of the
    conversation. Where there is no room for all, those with the least of `similarities` go first, the later of equals; the last
    one is cut off at its end.
    """
    near = [0.0] * len(segments) if similarities is None else similarities
    ranked = sorted(zip(near, segments, strict=True), key=lambda pair: (-pair[0], pair[1].first))
    kept = [segment for _, segment in ranked]
    head = _head(tokenizer)
    while len(ids := tokenizer.encode(head + _body(kept))) > limit and len(kept) > 1:
        kept.pop()
    return ids[:limit]


def _head(tokenizer: Chat) -> str:
    """The instruction, the end of its turn and the head of a reply."""
    text = tokenizer.render([{"role": "user", "content": INSTRUCTION}], generation=True)
    return text[text.index(INSTRUCTION) :]


def _body(segments: Sequence[Segment]) -> str:
    return "\n\n".join(s.text for s in sorted(segments, key=lambda s: s.first))

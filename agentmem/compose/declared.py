"""Declared templates: texts with {{slots}}. Their fixed text says where slots are before the content was ever seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentmem.compose.recognise import Characters, Span
from agentmem.compose.template import MARK
from agentmem.errors import BadRequest
from agentmem.model.chat import ChatTokenizer


def check(text: str) -> None:
    """Raises BadRequest for a text without slots, or without text between two of them or beside the only one."""
    runs = MARK.split(text)[::2]
    if len(runs) < 2:
        raise BadRequest("a template needs a slot, like {{question}}", param="template")
    if not all(run.strip() for run in runs[1:-1]) or not any(run.strip() for run in runs):
        raise BadRequest("a template needs text between its slots", param="template")


def cut(
    ids: Sequence[int], spans: Sequence[Span], templates: Mapping[str, str], tokenizer: ChatTokenizer
) -> list[Span]:
    """The spans, with slots in place of the whole prompt's or of a message's where a template is that of it."""
    if not templates:
        return list(spans)
    prompt = Characters(ids, tokenizer)
    whole = _slots(prompt, 0, len(prompt.text), templates)
    if whole is not None:
        return whole
    out = []
    for span in spans:
        slots = _slots(prompt, *prompt.bytes_of(span), templates)
        out += [span] if slots is None else slots
    return out


def _slots(prompt: Characters, start: int, stop: int, templates: Mapping[str, str]) -> list[Span] | None:
    """The slots between these bytes, by the template of the most fixed text; None where there is none."""
    best, most = None, 0
    for text in templates.values():
        parts = MARK.split(text)
        runs, names = [run.encode() for run in parts[::2]], parts[1::2]
        places = _places(prompt.text, start, stop, runs)
        size = sum(map(len, runs))
        if places is not None and size > most:
            found = [prompt.span(*at, f"slot:{name}") for at, name in zip(places, names, strict=True)]
            best, most = [s for s in found if s is not None], size
    return best


def _places(text: bytes, start: int, stop: int, runs: Sequence[bytes]) -> list[tuple[int, int]] | None:
    """Where slots lie between runs that begin at `start`, follow one another, and end at `stop`."""
    if not text.startswith(runs[0], start, stop):
        return None
    at, last = start + len(runs[0]), stop - len(runs[-1])
    places = []
    for run in runs[1:-1]:
        found = text.find(run, at, last)
        if found < 0:
            return None
        places.append((at, found))
        at = found + len(run)
    if at > last or not text.startswith(runs[-1], last, stop):
        return None
    return [*places, (at, last)]

"""Conversations as one long prompt, and questions behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentmem.episode.utterance import Utterance
from agentmem.model.chat import ChatTokenizer

ASK = "Answer the question about the conversation above in a few words. Question: {question}"
ASK_DATE = "Use the DATE of the CONVERSATION for an approximate date."
MARK = "\u2042"


@dataclass(frozen=True, slots=True)
class Question:
    """`evidence`: numbers of the utterances that it is about; `dated`: it asks for a time; `others`: where it asks for a planted
    fact, what was said of its kind besides, and `lead` is what the reply begins with."""

    text: str
    answer: str
    evidence: tuple[int, ...] = ()
    dated: bool = False
    others: tuple[str, ...] = ()
    lead: str = ""

    @property
    def planted(self) -> bool:
        return bool(self.others)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Sessions one after the other: a date and what was said, each; utterances are numbered through."""

    name: str
    sessions: tuple[tuple[str, tuple[Utterance, ...]], ...]
    questions: tuple[Question, ...]

    @property
    def utterances(self) -> list[Utterance]:
        return [u for _, said in self.sessions for u in said]

    @property
    def text(self) -> str:
        speakers = list(dict.fromkeys(u.speaker for u in self.utterances))
        head = f"Below is a conversation between {' and '.join(speakers)}. It takes place over several days."
        parts = [
            f"DATE: {date}\nCONVERSATION:\n" + "\n".join(f'{u.speaker} said, "{u.text}"' for u in said)
            for date, said in self.sessions
        ]
        return "\n\n".join([head, *parts])


class Frame:
    """How a model's chat template puts a user's message: what stands before its text, and what behind."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        head, _, foot = tokenizer.render([{"role": "user", "content": MARK}]).partition(MARK)
        self.head, self.foot = head, foot

    def history(self, text: str) -> list[int]:
        """The message as far as it goes: a question or a scoring prompt may follow."""
        return self.tokenizer.encode(self.head + text)

    def asked(self, instruction: str) -> list[int]:
        """The end of the message, and the head of the reply."""
        return self.tokenizer.encode(f"\n\n{instruction}{self.foot}")

    def question(self, question: Question) -> tuple[list[int], list[int]]:
        """The question behind a history, the reply as far as it is given, and the answer."""
        text = ASK.format(question=question.text) + (f" {ASK_DATE}" if question.dated else "")
        return self.asked(text) + self.tokenizer.encode(question.lead), self.tokenizer.encode(question.answer)


def first_that_fit(
    dialogue: Dialogue, frame: Frame, sessions: int, limit: int
) -> Dialogue:  # fmt: skip
    """The first sessions, at most `limit` tokens of them, with the questions that they answer."""
    for count in range(min(sessions, len(dialogue.sessions)), 0, -1):
        kept = dialogue.sessions[:count]
        said = sum(len(u) for _, u in kept)
        questions = tuple(q for q in dialogue.questions if q.evidence and max(q.evidence) < said)
        short = Dialogue(dialogue.name, kept, questions)
        if len(frame.history(short.text)) <= limit:
            return short
    raise ValueError(f"the first session of {dialogue.name} has more than {limit} tokens")


def evenly(questions: Sequence[Question], count: int | None) -> list[tuple[int, Question]]:
    """Numbers and questions, at most `count` of them, spread over all."""
    numbered = list(enumerate(questions))
    if count is None or len(numbered) <= count:
        return numbered
    return [numbered[i * len(numbered) // count] for i in range(count)]

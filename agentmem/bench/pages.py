"""Families of questions that each hand over a page of a manual: prompts three times as long as those of mere questions."""

from __future__ import annotations

import pydoc_data.topics
import re

ROLES = {
    "solver": "You teach Python to people who know another language. Explain {subject} by the page of the manual that you are "
    "given, in a few plain sentences, and name the one rule on it that people get wrong.",
    "analyst": "You review teaching material about {subject}. Compare what the teacher says with the page itself: say what is "
    "right, what was left out, and where a name or a condition was changed on the way.",
    "inspector": "You write the summary of a course about {subject}. From the page, the explanation and the remarks on it, make "
    "the few lines that a reader should know by heart, with the reason for each of them.",
    "critic": "You have repaired programs for many years, and know {subject} from what breaks. Say which of all this is "
    "forgotten most often, and what it looks like then.",
    "judge": "You edit the manual's pages on {subject}. After everything that was said, decide what stays as it is, what is to "
    "be said more clearly, and what needs an example.",
}
"""What the agents are told, with what the pages are about."""
SUBJECTS = {
    "specialnames": "special methods of classes",
    "compound": "compound statements",
    "types": "the standard types",
}
"""Topics of the language reference that Python brings."""
ASKED = (
    "What must somebody who learns this today keep in mind?",
    "Which mistake is this page meant to prevent?",
    "Who has to know this page best, and why?",
    "What on this page would you put into one sentence?",
    "Which word on this page needs an explanation?",
    "What does this page leave open?",
    "What would go wrong first if a program did not keep to this?",
)
PASSAGES, WORDS = 30, 180
_END = re.compile(r"(?<=[.!?:])\s+")


def questions(text: str) -> list[str]:
    """The passages of about as many words with which a text begins, cut at ends of sentences, each with something asked."""
    passages: list[list[str]] = [[] for _ in range(PASSAGES)]
    words = 0
    for sentence in _END.split(text.strip()):
        if words >= PASSAGES * WORDS:
            break
        passages[words // WORDS].append(sentence)
        words += len(sentence.split())
    return [f"{' '.join(p)}\n\n{ASKED[n % len(ASKED)]}" for n, p in enumerate(passages) if p]


def manual(topic: str) -> tuple[dict[str, str], list[str]]:
    """The roles and the questions of one of SUBJECTS."""
    roles = {agent: role.format(subject=SUBJECTS[topic]) for agent, role in ROLES.items()}
    return roles, questions(pydoc_data.topics.topics[topic])

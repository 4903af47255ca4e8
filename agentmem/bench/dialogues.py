"""Generated conversations on several topics, with planted facts: always the same ones for a seed."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from agentmem.bench.transcripts import Dialogue, Question
from agentmem.episode.utterance import Utterance

TOPICS, UTTERANCES, SESSIONS = 6, 12, 3
SPEAKERS = (("Nora", "Felix"), ("Irene", "Tom"), ("Clara", "Hugo"), ("Leila", "Oscar"), ("Marta", "Simon"))
WORDS = (
    "amber", "anchor", "birch", "cobalt", "comet", "coral", "cricket", "ember", "falcon", "fennel", "ginger", "granite",
    "harbor", "hazel", "indigo", "jasper", "juniper", "lantern", "lotus", "magnet", "maple", "marble", "meadow", "nectar",
    "nutmeg", "onyx", "orchid", "pepper", "pigeon", "quartz", "raven", "saffron", "sapphire", "thistle", "topaz", "tundra",
    "velvet", "violet", "walnut", "willow",
)  # fmt: skip
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")


@dataclass(frozen=True, slots=True)
class _Line:
    topic: str
    speaker: str
    text: str
    fact: bool = False


def generated(seed: int, topics: int = TOPICS, utterances: int = UTTERANCES) -> Dialogue:
    """Two people who come back to every topic in every session.

    On each topic one of them says a fact, and the other says the same of herself with another value; the question is about one
    of the two, and the reply begins with the words of the fact. `topics` is 8 at most, `utterances` of a topic lie between 6 and
    14.
    """
    draw = random.Random(seed)
    known = tomllib.loads(files("agentmem.bench").joinpath("topics.toml").read_text(encoding="utf-8"))[
        "topic"
    ]
    chosen = draw.sample(known, topics)
    names = draw.choice(SPEAKERS)
    words = draw.sample(WORDS, 2 * topics)
    digits = [str(n) for n in draw.sample(range(1000, 10000), 2 * topics)]
    told, asked = {}, {}
    values: dict[str, list[str]] = {}
    for number, topic in enumerate(chosen):
        pool = words if topic["values"] == "words" else digits
        speaker, value, other = draw.randrange(2), pool[2 * number], pool[2 * number + 1]
        told[topic["name"]] = _told(topic, names, speaker, value, other, utterances, draw)
        lead = topic["fact"].partition(" {value}")[0]
        asked[topic["name"]] = topic["question"].format(speaker=names[speaker]), value, topic["values"], lead
        values.setdefault(topic["values"], []).extend((value, other))
    sessions = _sessions(told, draw)
    said = [line for lines in sessions for line in lines]
    questions = []
    for number, line in enumerate(said):
        if line.fact:
            text, value, kind, lead = asked[line.topic]
            others = tuple(f" {v}" for v in values[kind] if v != value)
            questions.append(Question(text, f" {value}", (number,), others=others, lead=lead))
    dates = _dates(len(sessions), draw)
    spoken = (tuple(Utterance(line.speaker, line.text) for line in lines) for lines in sessions)
    return Dialogue(f"planted-{seed}", tuple(zip(dates, spoken, strict=True)), tuple(questions))


def _told(
    topic: Mapping[str, Any], names: tuple[str, str], speaker: int, value: str, other: str, count: int,
    draw: random.Random,
) -> list[_Line]:  # fmt: skip
    """What is said on one topic, by turns; the fact by `speaker`, the distractor by the other one."""
    lines = draw.sample(topic["lines"], count - 2)
    first = draw.randrange(2)
    turns = [(first + i) % 2 for i in range(count)]
    fact = draw.choice([i for i in range(count) if turns[i] == speaker])
    distractor = draw.choice([i for i in range(count) if turns[i] != speaker])
    special = {fact: topic["fact"].format(value=value), distractor: topic["distractor"].format(value=other)}
    rest = iter(lines)
    return [
        _Line(topic["name"], names[turn], special.get(i) or next(rest), fact=i == fact)
        for i, turn in enumerate(turns)
    ]


def _sessions(told: Mapping[str, list[_Line]], draw: random.Random) -> list[list[_Line]]:
    """Every topic in every session, in an order and in lengths of their own: what follows is not always what belongs together."""
    sessions: list[list[_Line]] = [[] for _ in range(SESSIONS)]
    cuts = {}
    for name, lines in told.items():
        even = len(lines) // SESSIONS
        first = even + draw.randint(-1, 1)
        cuts[name] = (0, first, first + even, len(lines))
    for number, session in enumerate(sessions):
        for name in draw.sample(sorted(told), len(told)):
            session += told[name][cuts[name][number] : cuts[name][number + 1]]
    return sessions


def _dates(count: int, draw: random.Random) -> list[str]:
    first = draw.randrange(len(MONTHS) - count + 1)
    return [f"{draw.randint(1, 28)} {MONTHS[first + i]} 2023" for i in range(count)]

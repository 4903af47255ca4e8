"""Conversations in the form of the LoCoMo data set, read from a file that the user names; none of it is part of this project."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentmem.bench.transcripts import Dialogue, Question
from agentmem.episode.utterance import Utterance

ADVERSARIAL = 5
"""Its questions have no answer, so whatever forgets does well; left out, as in EpiCache, appendix."""
TEMPORAL = 2
_EVIDENCE = re.compile(r"D\d+:\d+")


def read(path: Path) -> list[Dialogue]:
    """All conversations of the file. Raises ValueError where it is absent or of another form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_dialogue(item) for item in found]
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no file {path}; get the conversations of LoCoMo and name their file"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold conversations as LoCoMo has them ({error!r})") from error


def _dialogue(item: Mapping[str, Any]) -> Dialogue:
    talk, sessions, numbers = item["conversation"], [], dict[str, int]()
    names = [key for key in talk if re.fullmatch(r"session_\d+", key)]
    for name in sorted(names, key=lambda key: int(key.removeprefix("session_"))):
        said = []
        for line in talk[name]:
            if line["text"].strip():
                numbers[line["dia_id"]] = len(numbers)
                said.append(Utterance(line["speaker"], line["text"].strip()))
        sessions.append((str(talk.get(f"{name}_date_time", "")), tuple(said)))
    questions = [_question(q, numbers) for q in item["qa"] if q["category"] != ADVERSARIAL]
    return Dialogue(str(item["sample_id"]), tuple(sessions), tuple(questions))


def _question(item: Mapping[str, Any], numbers: Mapping[str, int]) -> Question:
    named = {name for text in item.get("evidence", []) for name in _EVIDENCE.findall(text)}
    evidence = tuple(sorted(numbers[name] for name in named if name in numbers))
    return Question(item["question"], str(item["answer"]), evidence, dated=item["category"] == TEMPORAL)

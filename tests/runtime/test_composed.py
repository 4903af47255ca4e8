"""Composed reuse of a daemon: what one agent has read, another need not read behind its own system prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.engine.request import ChatRequest, Finished, Started
from agentmem.runtime import Runtime
from tests.engine.turns import words
from tests.runtime.agents import Running, cached, memory, open_runtime

SOLVER = "You solve what is asked, step by step, and you say what you are sure of."
JUDGE = "You are strict. You look for what is wrong in what others say, and name it in few words."
DOCUMENTS = [words(random.Random(n), 24) for n in range(8)]
ENOUGH = 5
"""Texts that a template has seen from which on it composes another; see `agentmem.compose.anchors.MINIMUM`."""


def read(runtime: Runtime, agent: str, system: str, text: str, session: str, **options: Any) -> Running:
    """One agent is shown a text, in a session of its own."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    fields: dict[str, Any] = {"max_tokens": 8, "reuse": "composed", **options}
    return Running(runtime, ChatRequest(agent, messages, session=session, **fields))


def taught(runtime: Runtime, known: int = ENOUGH + 1) -> None:
    """The solver has read `known` documents, and the judge as many as it takes."""
    for n, text in enumerate(DOCUMENTS[:known]):
        read(runtime, "solver", SOLVER, text, f"s{n}").end()
    for n, text in enumerate(DOCUMENTS[:ENOUGH]):
        read(runtime, "judge", JUDGE, text, f"s{n}").end()


def check(runtime: Runtime) -> None:
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    composer = runtime._engine.composing.composer
    assert not isinstance(composer, str)
    runtime._call(composer.library.check_integrity)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = open_runtime(tmp_path)
    yield runtime
    runtime.close()


def test_a_text_that_another_agent_has_read_is_composed(runtime: Runtime) -> None:
    """Tokens are counted where they belong, the same in the announcement, the usage, the explanation."""
    taught(runtime)
    new = DOCUMENTS[ENOUGH]
    running = read(runtime, "judge", JUDGE, new, "new")
    end = running.end()
    started = running.events[0]
    assert isinstance(started, Started)
    put = memory(end)["composed_tokens"]
    assert len(new.encode()) - 1 <= put < len(new.encode()) + 40
    assert started.composed_tokens == put
    assert cached(end) == memory(end)["exact_tokens"] == started.cached_tokens > len(JUDGE)
    assert memory(end)["prefilled_tokens"] == end.usage["prompt_tokens"] - put - cached(end) < 40
    told = runtime.explain("judge", "new")
    assert (told["reuse"], told["composed_tokens"]) == ("composed", put)
    assert f"{len(new.encode())} tokens of a user message composed from {ENOUGH} anchors" in told["composition"][0]
    check(runtime)

"""Composed reuse of a daemon: what one agent has read, another need not read behind its own system prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.engine.request import ChatRequest, Finished, Started
from agentmem.runtime import Runtime
from tests.engine.turns import words
from tests.runtime.agents import Running, cached, memory, open_runtime

SOLVER = "You solve what is asked, step by step, and you say what you are sure of."
JUDGE = "You are strict. You look for what is wrong in what others say, and name it in few words."
DOCUMENTS = [words(random.Random(n), 24) for n in range(8)]
ENOUGH, MANY = 5, 80
"""Texts that a template has seen from which on it composes another; see `agentmem.compose.anchors.MINIMUM`."""


def read(runtime: Runtime, agent: str, system: str, text: str, session: str, **options: Any) -> Running:
    """One agent is shown a text, in a session of its own."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    fields: dict[str, Any] = {"max_tokens": 8, "reuse": "composed", **options}
    return Running(runtime, ChatRequest(agent, messages, session=session, **fields))


def taught(runtime: Runtime, known: int = ENOUGH + 1) -> list[tuple[str, str, str]]:
    """The solver has read `known` documents, and the judge as many as it takes: system prompts, documents and replies."""
    done = []
    for agent, system, texts in (("solver", SOLVER, DOCUMENTS[:known]), ("judge", JUDGE, DOCUMENTS[:ENOUGH])):
        for n, text in enumerate(texts):
            done.append((system, text, read(runtime, agent, system, text, f"s{n}").end().text))
    return done


def check(runtime: Runtime) -> None:
    def integrity() -> None:
        runtime._engine.composing.let_go()  # an audit may be on its way
        runtime._pool.check()
        assert runtime._pool.tails.used == 0
        composer = runtime._engine.composing.composer
        assert not isinstance(composer, str)
        composer.library.check_integrity()

    runtime._call(integrity)


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
    assert 0.9 * len(new.encode()) <= put < len(new.encode()) + 40, "all but the end of the prompt"
    assert started.composed_tokens == put
    assert cached(end) == memory(end)["exact_tokens"] == started.cached_tokens > len(JUDGE)
    assert memory(end)["prefilled_tokens"] == end.usage["prompt_tokens"] - put - cached(end) < 40
    told = runtime.explain("judge", "new")
    assert (told["reuse"], told["composed_tokens"]) == ("composed", put)
    counts = [int(line.split()[0]) for line in told["composition"]]
    assert sum(counts) == put
    assert f"{counts[0]} tokens of a user message composed from {ENOUGH} anchors" == told["composition"][0]
    check(runtime)


def test_what_was_taught_survives_a_restart(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    taught(runtime)
    before = runtime._call(lambda: held(runtime))
    runtime.close()
    runtime = open_runtime(tmp_path)
    end = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH], "new").end()
    assert memory(end)["composed_tokens"] >= 0.9 * len(DOCUMENTS[ENOUGH].encode())
    assert before <= runtime._call(lambda: held(runtime))
    check(runtime)
    runtime.close()


def test_a_text_that_was_read_in_its_very_place_gives_the_answer_of_a_dense_run(runtime: Runtime) -> None:
    """Its anchor is its own: what it went through there stands for itself. Its exact state is gone."""
    taught(runtime, ENOUGH)
    want = read(runtime, "judge", JUDGE, DOCUMENTS[0], "dense", reuse="off", max_tokens=24).end()
    drop_exact_state(runtime)
    again = read(runtime, "judge", JUDGE, DOCUMENTS[0], "again", max_tokens=24).end()
    assert cached(again) < 64
    assert memory(again)["composed_tokens"] >= len(DOCUMENTS[0].encode()) - 1
    assert "composed from 1 anchor" in runtime.explain("judge", "again")["composition"][0]
    assert again.text == want.text


def test_exact_requests_take_no_notice(runtime: Runtime) -> None:
    """The bits of a reply do not depend on what is composed around it, and nothing is taken down of it."""
    exact = read(runtime, "plain", JUDGE, DOCUMENTS[ENOUGH], "a", reuse="exact", namespace="other").end()
    assert runtime._engine.composing.made is None
    assert not runtime._settings.paths.composed.exists()
    taught(runtime)
    known = runtime._call(lambda: held(runtime))
    again = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH], "b", reuse="exact").end()
    assert (again.text, memory(again)["composed_tokens"]) == (exact.text, 0)
    assert runtime._call(lambda: held(runtime)) == known
    assert "composition" not in runtime.explain("judge", "b")


def test_what_an_agent_read_is_forgotten_with_it(tmp_path: Path) -> None:
    """Also on disk, and by a daemon that has composed nothing since it started."""
    ids = np.frombuffer(DOCUMENTS[0].encode(), np.uint8).astype("<i4").tobytes()

    def on_disk() -> bool:
        return any(ids in p.read_bytes() for p in (tmp_path / "composed").rglob("*") if p.is_file())

    runtime = open_runtime(tmp_path)
    taught(runtime)
    runtime.close()
    assert on_disk()
    runtime = open_runtime(tmp_path)
    runtime.forget("solver")
    runtime.forget("judge")
    assert runtime._call(lambda: held(runtime)) == set()
    runtime.close()
    assert not on_disk()
    assert not list((tmp_path / "composed" / "items").iterdir())


def test_agents_that_are_encrypted_or_off_the_disk_stay_apart(runtime: Runtime) -> None:
    runtime.create("sealed", {"encrypt": "file", "reuse": "composed"})
    for agent, options in (("sealed", {"reuse": None}), ("ghost", {"persist": False})):
        end = read(runtime, agent, JUDGE, DOCUMENTS[0], "s", **options).end()
        assert memory(end)["composed_tokens"] == 0
        assert "encrypted, or kept off the disk" in runtime.explain(agent, "s")["composition"][0]
    assert runtime._engine.composing.made is None


def test_namespaces_teach_each_other_nothing(runtime: Runtime) -> None:
    taught(runtime)
    for n, text in enumerate(DOCUMENTS[:ENOUGH]):
        read(runtime, "judge", JUDGE, text, f"s{n}", namespace="other").end()
    end = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH], "new", namespace="other").end()
    assert memory(end)["composed_tokens"] == 0


def test_memory_that_is_too_small_for_it_leaves_the_prompt_dense(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, compose_budget=1 << 40)
    end = read(runtime, "judge", JUDGE, DOCUMENTS[0], "a").end()
    assert memory(end)["composed_tokens"] == 0
    assert runtime.explain("judge")["composition"] == [
        "not composed: memory_limit has no room for compose_budget"
    ]
    runtime.close()


def test_what_cannot_be_opened_leaves_the_prompt_dense(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    (tmp_path / "composed").write_text("in the way")
    end = read(runtime, "judge", JUDGE, DOCUMENTS[0], "a").end()
    assert (memory(end)["composed_tokens"], end.finish_reason) == (0, "length")
    assert "see the daemon's log" in runtime.explain("judge")["composition"][0]
    runtime.close()


def held(runtime: Runtime) -> set[tuple[str, bytes]]:
    """The texts that the library has, by namespace. Engine thread."""
    composer = runtime._engine.composing.composer
    assert not isinstance(composer, str)
    return {(name, text) for name, space in composer.library.spaces.items() for text in space.segments}


def drop_exact_state(runtime: Runtime) -> None:
    """As if it had been too old to keep."""
    runtime.prune(0.0)

    def fill() -> None:
        pool = runtime._pool
        runtime._engine.composing.let_go()
        pool.release(pool.take(pool.slots.count))
        runtime._memory.journal.bury()

    runtime._call(fill)


@pytest.mark.slow(minutes=0.5)
def test_many_at_once_hold_nothing_afterwards(tmp_path: Path) -> None:
    """Composed, exact and cancelled turns of several agents beside each other, in little memory."""
    runtime = open_runtime(tmp_path, ram_budget=3 << 20, page_tokens=32, chunk_tokens=64, max_batch=6)
    taught(runtime)
    texts, composed = [words(random.Random(100 + n), 24) for n in range(MANY // 2)], list[int]()
    for number, text in enumerate(texts):
        read(runtime, "solver", SOLVER, text, f"t{number}").end()

    def one(number: int) -> None:
        rng = random.Random(number)
        agent, system = rng.choice(
            [("solver", SOLVER), ("judge", JUDGE), ("judge", JUDGE), ("other", JUDGE + " Be brief.")]
        )
        text = rng.choice([texts[number // 2], "Two texts. " + " ".join(rng.sample(texts, 2))])
        running = read(
            runtime, agent, system, text, f"m{number}", reuse=rng.choice(["composed", "composed", "exact", "off"]),
            planner=rng.choice([None, "blend"]),
            n=rng.choice([1, 1, 2]), max_tokens=rng.choice([1, 8, 70]),
        )  # fmt: skip
        if rng.random() < 0.2:
            running.ticket.cancel()
        assert running._over.wait(60)
        last = running.events[-1]
        assert isinstance(last, Finished), last
        composed.append(memory(last)["composed_tokens"])

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(one, number) for number in range(MANY)]:
            done.result()
    assert any(composed)
    check(runtime)
    runtime._when_written(lambda: None)
    assert not runtime._call(lambda: [p for t in runtime._pool.trees() for p in t.pages() if p.pins])
    runtime.close()

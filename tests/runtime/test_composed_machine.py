"""Nothing that was composed is ever taken for exact: random turns of agents, some of them composed, with restarts between.

A second runtime does the same but for what was composed in the first. Whatever is asked exactly has the same bits in both.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from agentmem.engine.request import ChatRequest, Finished
from agentmem.model.random import byte_tokenizer
from agentmem.runtime import Runtime
from tests.runtime.agents import Running, cached, memory, open_runtime
from tests.runtime.test_composed import DOCUMENTS, JUDGE, SOLVER, check, drop_exact_state, taught

SYSTEMS = {"solver": SOLVER, "judge": JUDGE}
OPTIONS: dict[str, Any] = {"page_tokens": 32, "chunk_tokens": 64}
NOTHING: dict[str, Any] = {**OPTIONS, "compose_budget": 0}


@cache
def prepared() -> tuple[Path, list[tuple[str, str, str]]]:
    """Two homes whose agents have read the same; only the first may compose. What was read."""
    root = Path(tempfile.mkdtemp(prefix="agentmem-composed-"))
    for name, options in (("first", OPTIONS), ("second", NOTHING)):
        runtime = open_runtime(root / name, **options)
        done = taught(runtime)
        runtime.close()
    return root, done


@dataclass
class Talk:
    """One session of an agent, as its client has it."""

    agent: str
    name: str
    messages: list[dict[str, str]] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="agentmem-machine-"))
        for name in ("first", "second"):
            shutil.copytree(prepared()[0] / name, self.root / name)
        self.first, self.second = self.opened()
        self.talks: list[Talk] = []
        self.read: list[list[int]] = []
        self.probes = 0
        for texts in prepared()[1]:
            roles = ("system", "user", "assistant")
            self.note([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])

    def opened(self) -> tuple[Runtime, Runtime]:
        return open_runtime(self.root / "first", **OPTIONS), open_runtime(self.root / "second", **NOTHING)

    def note(self, messages: list[dict[str, str]]) -> None:
        """All of this was read, or had been before: it may be in the exact store."""
        tokenizer = byte_tokenizer()
        self.read.append(tokenizer.encode(tokenizer.render(messages)))

    def say(
        self, runtime: Runtime, agent: str, session: str, messages: list[dict[str, str]], **options: Any
    ) -> Finished:
        fields = {"max_tokens": 6, "top_logprobs": 20, **options}
        return Running(runtime, ChatRequest(agent, list(messages), session=session, **fields)).end()

    @rule(
        agent=st.sampled_from(sorted(SYSTEMS)), document=st.sampled_from(DOCUMENTS),
        reuse=st.sampled_from(["composed", "composed", "exact", "auto", "off"]),
        planner=st.sampled_from([None, "blend", "lego"]), go_on=st.integers(0, 3),
    )  # fmt: skip
    def turn(self, agent: str, document: str, reuse: str, planner: str | None, go_on: int) -> None:
        """A new session, or one more message of one that there is."""
        mine = [t for t in self.talks if t.agent == agent]
        if go_on < len(mine):
            talk = mine[go_on]
        else:
            talk = Talk(agent, f"t{len(self.talks)}", [{"role": "system", "content": SYSTEMS[agent]}])
            self.talks.append(talk)
        talk.messages.append({"role": "user", "content": document})
        end = self.say(self.first, agent, talk.name, talk.messages, reuse=reuse, planner=planner)
        assert reuse == "composed" or not memory(end)["composed_tokens"]
        if not memory(end)["composed_tokens"]:
            same = self.say(self.second, agent, talk.name, talk.messages, reuse=reuse)
            assert (same.logprobs, cached(same)) == (end.logprobs, cached(end))
        talk.messages.append({"role": "assistant", "content": end.text})
        if not memory(end)["composed_tokens"]:
            self.note(talk.messages)

    @rule(
        agent=st.sampled_from(sorted(SYSTEMS)), document=st.sampled_from(DOCUMENTS), depth=st.integers(0, 3)
    )
    def ask_exactly(self, agent: str, document: str, depth: int) -> None:
        """Somebody new says what was said before, or something else in its place: the logits are those of the other runtime."""
        known = [t.messages for t in self.talks if t.agent == agent and len(t.messages) > 2]
        messages = (
            known[depth][:-1] if depth < len(known) else [{"role": "system", "content": SYSTEMS[agent]}]
        )
        if messages[-1]["role"] != "user":
            messages = [*messages, {"role": "user", "content": document}]
        self.probes += 1
        first, second = (
            self.say(runtime, f"probe{self.probes}", "default", messages, max_tokens=2)
            for runtime in (self.first, self.second)
        )
        assert memory(first)["composed_tokens"] == 0
        assert (first.logprobs, cached(first)) == (second.logprobs, cached(second))
        self.note([*messages, {"role": "assistant", "content": first.text}])

    @rule()
    def restart(self) -> None:
        self.first.close()
        self.second.close()
        self.first, self.second = self.opened()

    @rule()
    def lose_exact_state(self) -> None:
        for runtime in (self.first, self.second):
            drop_exact_state(runtime)

    @invariant()
    def pages_hold_what_was_read(self) -> None:
        """Every path through the page tree is the beginning of something that was read as a whole."""
        paths = self.first._call(
            lambda: [
                [int(i) for p in page.chain() for i in p.tokens]
                for tree in self.first._pool.trees()
                for page in tree.pages()
                if not page.children
            ]
        )
        for path in paths:
            assert any(ids[: len(path)] == path for ids in self.read), bytes(i for i in path if i < 256)
        check(self.first)

    def teardown(self) -> None:
        self.first.close()
        self.second.close()
        shutil.rmtree(self.root)


@pytest.mark.slow(minutes=0.5)
def test_nothing_composed_is_reachable_as_exact() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("planner", [None, "blend"])
def test_the_machine_composes(planner: str | None) -> None:
    """Else it would show nothing."""
    machine = Machine()
    machine.turn("judge", DOCUMENTS[5], "composed", planner, 9)
    assert machine.first.explain("judge", "t0")["composed_tokens"] > 100
    machine.ask_exactly("judge", DOCUMENTS[5], 0)
    machine.restart()
    machine.ask_exactly("judge", DOCUMENTS[5], 0)
    machine.pages_hold_what_was_read()
    machine.teardown()

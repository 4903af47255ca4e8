"""What the demo really does: the same conversations twice, with a crash in the middle and without."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agentmem.cli.daemon import Daemon, start_daemon
from agentmem.cli.demo_agents import DemoAgent
from agentmem.client import AgentMemClient
from agentmem.home import Home, default_home

REPLY_TOKENS = 16
TURNS = 3
PHASES = ("cold", "hot", "warm")


class Watcher(Protocol):
    """Who is told how far the demo is."""

    def step(self, text: str) -> None: ...
    def done(self) -> None: ...
    def daemon(self, fraction: float, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its greedy reply. `ttft_ms`: from sending the request to the first piece of text."""

    question: str
    reply: str
    ttft_ms: float
    usage: dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """An agent's turns so far; the whole history is sent again on every turn, as chat clients do."""

    agent: DemoAgent
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def replies(self) -> list[str]:
        return [turn.reply for turn in self.turns]

    def ask_next(self, client: AgentMemClient) -> None:
        """Ask the agent's next question and note the reply."""
        question = self.agent.questions[len(self.turns)]
        messages = [self.agent.system_message]
        for turn in self.turns:
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.reply},
            ]
        messages.append({"role": "user", "content": question})
        start = time.perf_counter()
        first: float | None = None
        with client.stream_chat(self.agent.name, messages, max_tokens=REPLY_TOKENS, temperature=0) as stream:
            for _ in stream:
                first = first or time.perf_counter()
        seconds = (first or time.perf_counter()) - start
        result = stream.result
        self.turns.append(Turn(question, result.text, 1000 * seconds, result.usage))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One agent's conversation with a crash before its last turn, and the same without."""

    crashed: Conversation
    uninterrupted: Conversation

    @property
    def identical(self) -> bool:
        return self.crashed.replies == self.uninterrupted.replies

    def as_json(self) -> dict[str, Any]:
        """The row of the demo's table. Milliseconds; bytes of the whole state after the last turn."""
        cold, hot, warm = (turn.ttft_ms for turn in self.crashed.turns)
        info = self.crashed.info
        return {
            "name": self.crashed.agent.name,
            "tokens": info["tokens"],
            "cold_ttft_ms": round(cold, 1),
            "hot_ttft_ms": round(hot, 1),
            "warm_ttft_ms": round(warm, 1),
            "speedup_warm": round(cold / warm, 1),
            "identical": self.identical,
            "bytes_q4": info["disk_bytes"],
            "bytes_fp16": info["fp16_bytes"],
            "turns": [
                {"phase": phase, "question": turn.question, "reply": turn.reply, "usage": turn.usage}
                for phase, turn in zip(PHASES, self.crashed.turns, strict=True)
            ],
            "uninterrupted_replies": self.uninterrupted.replies,
        }


def step_count(agents: list[DemoAgent]) -> int:
    """How many steps `run_demo` reports."""
    return 2 * TURNS * len(agents) + 3


def run_demo(folder: Path, agents: list[DemoAgent], model: str, watcher: Watcher) -> list[Outcome]:
    """Run both sides in two new homes below `folder`. Leaves no daemon behind."""
    crashed = _with_crash(Home(folder / "crashed"), agents, model, watcher)
    plain = _without_crash(Home(folder / "uninterrupted"), agents, model, watcher)
    return [Outcome(one, other) for one, other in zip(crashed, plain, strict=True)]


def _with_crash(home: Home, agents: list[DemoAgent], model: str, watcher: Watcher) -> list[Conversation]:
    conversations = [Conversation(agent) for agent in agents]
    with _daemon(home, model, watcher, "starting the daemon") as daemon, _client(daemon) as client:
        for phase in PHASES[:2]:
            _ask_all(conversations, client, phase, watcher)
        daemon.kill()
    with (
        _daemon(home, model, watcher, "killed with SIGKILL; starting again") as daemon,
        _client(daemon) as client,
    ):
        _ask_all(conversations, client, PHASES[2], watcher)
        for conversation in conversations:
            conversation.info = client.agent(conversation.agent.name)
    return conversations


def _without_crash(home: Home, agents: list[DemoAgent], model: str, watcher: Watcher) -> list[Conversation]:
    conversations = [Conversation(agent) for agent in agents]
    with _daemon(home, model, watcher, "starting a second daemon") as daemon, _client(daemon) as client:
        for _ in PHASES:
            _ask_all(conversations, client, "uninterrupted", watcher)
    return conversations


def _ask_all(conversations: list[Conversation], client: AgentMemClient, phase: str, watcher: Watcher) -> None:
    for conversation in conversations:
        watcher.step(f"{phase}: {conversation.agent.name}")
        conversation.ask_next(client)
        watcher.done()


@contextmanager
def _daemon(home: Home, model: str, watcher: Watcher, step: str) -> Iterator[Daemon]:
    watcher.step(step)
    daemon = start_daemon(
        home,
        {"port": 0, "model": model},
        environment=_environment(os.environ),
        on_progress=watcher.daemon,
    )
    watcher.done()
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.stop()


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The demo's daemons share the models of the usual home, and no other setting of this person."""
    plain = {name: value for name, value in ours.items() if not name.startswith("AGENTMEM_")}
    return {**plain, "AGENTMEM_MODELS": str(Home(default_home()).models)}


def _client(daemon: Daemon) -> AgentMemClient:
    return AgentMemClient(url=daemon.url, home=daemon.home.root)

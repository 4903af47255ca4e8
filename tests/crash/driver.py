"""A process that lives through rounds of a home: each round is a child of its own, which may be killed at a failpoint.

Reads one round per line on standard input and answers with one line: how the child ended. Children are forked before MLX was
used, so a round costs no imports.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agentmem.blockpool.failpoint import arm
from agentmem.errors import AgentMemError
from agentmem.runtime import Runtime
from tests.runtime.agents import extents, open_runtime, turn

WORDS = [
    "the",
    "lamp",
    "keeper",
    "counts",
    "oil",
    "and",
    "writes",
    "it",
    "down",
    "night",
    "by",
    "before",
    "tide",
    "comes",
    "in",
]
AGENTS = ("ada", "bob", "cleo")


def said(agent: str, n: int) -> str:
    """What `agent` is told in its turn `n`: some turns are a word, some fill pages."""
    rng = random.Random(f"{agent} {n}")
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 3, 12, 60])))


def reply(runtime: Runtime, agent: str, n: int) -> str:
    return turn(runtime, agent, said(agent, n), max_tokens=4 + n % 3).text


@dataclass(slots=True)
class Round:
    """One life. `allowed`: {agent: numbers of turns that it may have at the start}.

    `lossy`: agents whose state was damaged or dropped. Their tokens may have to be read anew, in other pieces than they came in;
    with a 4-bit cache that may lead to other words, so their replies are not compared, and they are forgotten.
    """

    home: str
    journal: str
    reference: dict[str, list[str]]
    allowed: dict[str, list[int]]
    seed: int
    failpoint: str = ""
    actions: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)


class Life:
    """Looks at what the lives before left, then acts; every outcome is noted in the journal when it is certain."""

    def __init__(self, round: Round) -> None:
        self.round = round
        self.rng = random.Random(round.seed)
        self.home = Path(round.home)
        self.runtime = open_runtime(self.home)
        self.turns = {agent: self._look(agent) for agent in AGENTS}
        self.note(found=self.turns)
        self.lossy = set(round.lossy)
        for agent in round.lossy:
            self.forget(agent)

    def note(self, **entry: Any) -> None:
        fd = os.open(self.round.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, json.dumps(entry).encode() + b"\n")
        os.close(fd)

    def _look(self, agent: str) -> int:
        """The agent's turns; everything that was said in them is there."""
        try:
            turns = self.runtime.agent(agent)["turns"]
        except AgentMemError:
            turns = 0
        assert turns in self.round.allowed[agent], (agent, turns, self.round.allowed[agent])
        if turns:
            known = self.runtime._memory.agent("default", agent)
            assert known is not None
            (session,) = known.sessions.values()
            texts = [m["content"] for m in session.conversation.messages]
            want = [t for n in range(turns) for t in (said(agent, n), self.round.reference[agent][n])]
            step = 2 if agent in self.round.lossy else 1
            assert len(texts) == len(want)
            assert texts[::step] == want[::step], (agent, texts, want)
        return turns

    def act(self, action: str) -> None:
        agent = self.rng.choice(AGENTS)
        getattr(self, action)(agent)

    def speak(self, agent: str) -> None:
        n = self.turns[agent]
        if n == len(self.round.reference[agent]):
            self.forget(agent)
            return
        text = reply(self.runtime, agent, n)
        if agent not in self.lossy:
            assert text == self.round.reference[agent][n], (agent, n, text, self.round.reference[agent][n])
        self.turns[agent] = n + 1
        self.note(agent=agent, turns=n + 1)

    def speak_long(self, agent: str) -> None:
        for _ in range(10):
            self.speak(agent)

    def forget(self, agent: str) -> None:
        if self.turns[agent]:
            self.note(agent=agent, forgetting=True)
            self.runtime.forget(agent)
            self.turns[agent] = 0
            self.note(agent=agent, turns=0)
        self.lossy.discard(agent)

    def cool(self, agent: str) -> None:
        if self.turns[agent]:
            self.runtime.evict(agent)

    def lose(self, agents: list[str]) -> None:
        """From now on these agents' replies are not compared."""
        self.lossy.update(agents)
        self.note(lossy=sorted(self.lossy))

    def drop(self, agent: str) -> None:
        """Take the agent's last pages off the disk."""
        self.lose([agent])

        def job() -> None:
            known = self.runtime._memory.agent("default", agent)
            pages = [p for s in known.sessions.values() if s.head for p in s.head.chain()] if known else []
            leaves = [p for p in pages if p.pieces is not None and not p.children and not p.pins]
            if leaves:
                self.runtime._memory.drop(leaves, lambda *_: None)

        self.runtime._call(job)

    def damage(self, agent: str) -> None:
        """Flip a bit in an extent, then make everybody read."""
        known = [path for path in extents(self.home) if path.suffix != ".tmp"]
        if not known:
            return
        self.lose([name for name in AGENTS if self.turns[name]])
        # The background may merge an extent into another and unlink it meanwhile.
        with suppress(FileNotFoundError):
            self._flip(self.rng.choice(known))
        for name in AGENTS:
            if self.turns[name]:
                self.runtime.evict(name)
                self.runtime.warm(name)

    def _flip(self, path: Path) -> None:
        with path.open("r+b") as file:
            at = self.rng.randrange(path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << self.rng.randrange(8)]))


def live(round: Round) -> None:
    arm(round.failpoint)
    life = Life(round)
    for action in round.actions:
        life.act(action)
    life.runtime.close()


def make_reference(home: Path, turns: int) -> dict[str, list[str]]:
    """The replies of a home that nothing happens to."""
    runtime = open_runtime(home)
    replies = {agent: [reply(runtime, agent, n) for n in range(turns)] for agent in AGENTS}
    runtime.close()
    return replies


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def answer(job: dict[str, Any]) -> int:
    """Do one job in a child; returns how it ended."""
    if isinstance(job["reference"], str):
        make = partial(make_reference, Path(job["home"]), job["turns"])
        return in_child(lambda: Path(job["reference"]).write_text(json.dumps(make())))
    return in_child(lambda: live(Round(**job)))


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


class Driver:
    """The driver process, seen from a test."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors.open("a"), text=True, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    def _ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()[-3000:]
        return int(json.loads(line))

    def reference(self, folder: Path, turns: int) -> dict[str, list[str]]:
        to = folder / "replies.json"
        job = {"home": str(folder / "home"), "reference": str(to), "turns": turns}
        assert self._ask(job) == 0, self.errors.read_text()[-3000:]
        return dict(json.loads(to.read_text()))

    def live(self, round: Round) -> int:
        return self._ask(asdict(round))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


if __name__ == "__main__":
    main()

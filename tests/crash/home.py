"""A home with a few agents on the tiny model, and what a start on a copy of it must find."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem.engine.request import Finished
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.runtime.agents import BUDGET, LONG, cached, turn

SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64, "intermediate_size": 64}
MODEL = random_model("llama", seed=0, **SMALL)
"""Homes of it are opened by the thousand."""
TURNS = {
    "ada": (LONG, "and then?", "what else did the keeper write that night?"),
    "bob": (LONG + "who reads it?", "why?"),
    "cleo": ("hello",),
}


def start(home: Path, **options: Any) -> Runtime:
    """A runtime over the one model of this process: it takes a twentieth of a second."""
    return Runtime.open(Settings(home=home, **{"ram_budget": BUDGET, **options}), lambda: MODEL)


def make_home(home: Path, crashed: Path | None = None) -> Path:
    """A home; `crashed` becomes what a process that was killed in the end would have left of it."""
    runtime = start(home)
    for agent, texts in TURNS.items():
        for text in texts:
            turn(runtime, agent, text)
    if crashed is not None:
        runtime._store.flush()
        shutil.copytree(home, crashed)
    runtime.close()
    return home


@dataclass(frozen=True)
class Expected:
    """What each agent says next, how many turns it has, and the prompt tokens that need no prefill then."""

    replies: dict[str, str]
    prompts: dict[str, int]
    cached: dict[str, int]


def go_on(runtime: Runtime) -> dict[str, Finished]:
    """The next turn of every agent: a few tokens, for it is asked by the thousand."""
    return {agent: turn(runtime, agent, "go on", max_tokens=4) for agent in TURNS}


def ask_all(home: Path) -> Expected:
    """Start on `home` and ask every agent one thing more. Every agent has all of its turns, or this fails."""
    runtime = start(home)
    try:
        assert {a["agent"]: a["turns"] for a in runtime.agents()} == {a: len(t) for a, t in TURNS.items()}
        replies = go_on(runtime)
        assert not runtime.store()["disk"]["read_only"]
        return Expected(
            {a: r.text for a, r in replies.items()},
            {a: r.usage["prompt_tokens"] for a, r in replies.items()},
            {a: cached(r) for a, r in replies.items()},
        )
    finally:
        runtime.close()


def copy_of(home: Path, to: Path) -> Path:
    """A copy; a copy that was there goes away."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(home, to))


def fill(folder: Path) -> Path:
    """A file that takes what is left."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    return path

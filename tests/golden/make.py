"""Makes the golden home of this release: python -m tests.golden.make [FOLDER].

Every later release must open it and go on from it. It is made once, when a release is cut, and never changed afterwards.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from agentmem import __version__
from agentmem.quant.device import backend
from agentmem.runtime import Runtime
from tests.runtime.agents import cached, memory, open_runtime, turn

FOLDER = Path(__file__).parent
TURNS = {
    "ada": ("the keeper counts the oil, " * 3, "then?", "é ✓ why?"),
    "bob": ("the keeper counts the oil, " + "who reads?",),
}
FORKS = {"dora": ("ada", 2)}
NEXT = "go on"
KV_FORMAT = "q4-plain"
"""A format without values of a machine's own: what is stored must be found by its fingerprint anywhere."""


def told(runtime: Runtime) -> dict[str, Any]:
    """What a home holds, as far as every release must be able to tell it, and what every agent says next."""
    found: dict[str, Any] = {}
    for name in (a["agent"] for a in runtime.agents()):
        agent = runtime._memory.agent("default", name)
        assert agent is not None
        (session,) = agent.sessions.values()
        found[name] = {
            "turns": session.conversation.turns,
            "messages": session.conversation.messages,
            "ids": session.conversation.ids,
            "policy": agent.row.policy,
            "lineage": agent.row.lineage,
        }
    for name, facts in found.items():
        reply = turn(runtime, name, NEXT)
        facts |= {"cached": cached(reply), "prompt": reply.usage["prompt_tokens"]}
        if backend() == "cpu":  # elsewhere the last bits of the model's arithmetic are others
            facts["next"] = reply.text
        assert memory(reply)["committed"]
    return found


def make(folder: Path) -> None:
    """A home with three agents and a fork, and beside it what it holds."""
    shutil.rmtree(folder, ignore_errors=True)
    home = folder / "home"
    runtime = open_runtime(home, kv_format=KV_FORMAT)
    for agent, texts in TURNS.items():
        for text in texts:
            turn(runtime, agent, text)
    for name, (parent, at) in FORKS.items():
        runtime.fork(parent, name, at=at)
        turn(runtime, name, "else?")
    runtime.set_policy("ada", {"pinned": True})
    runtime.close()
    for leftover in ("logs", "models"):
        shutil.rmtree(home / leftover, ignore_errors=True)
    copy = Path(shutil.copytree(home, folder / "copy"))
    again = open_runtime(copy, kv_format=KV_FORMAT)
    (folder / "expected.json").write_text(json.dumps(told(again), indent=1, ensure_ascii=False) + "\n")
    again.close()
    shutil.rmtree(copy)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / __version__)

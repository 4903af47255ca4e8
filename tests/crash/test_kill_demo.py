"""SIGKILL at random moments of the demo: it goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from agentmem.cli.demo_agents import demo_agents
from agentmem.cli.demo_run import PHASES, Conversation
from agentmem.client import AgentMemClient
from agentmem.errors import AgentMemError
from tests.crash.daemon import Daemon
from tests.tiny_model import save_model

KILLS = 20
BUDGET = ("--ram-budget", "64MiB")


class Run:
    """One run of the demo, in a namespace of its own: its agents, its texts, its questions, in its order."""

    def __init__(self, home: Path, number: int) -> None:
        self.home, self.namespace = home, f"run-{number}"
        self.conversations = [Conversation(agent) for agent in demo_agents()]

    @property
    def complete(self) -> bool:
        return all(len(c.turns) == len(PHASES) for c in self.conversations)

    @property
    def turns(self) -> int:
        return sum(len(c.turns) for c in self.conversations)

    @property
    def replies(self) -> list[list[str]]:
        return [c.replies for c in self.conversations]

    def client(self) -> AgentMemClient:
        return AgentMemClient(home=self.home, namespace=self.namespace, timeout=60)

    def go_on(self) -> None:
        """Ask what is still to be asked. Raises AgentMemError when the daemon dies meanwhile."""
        with self.client() as client:
            for done in range(len(PHASES)):
                for conversation in self.conversations:
                    if len(conversation.turns) == done:
                        conversation.ask_next(client)

    def check(self) -> None:
        """Every turn that was acknowledged is there: it is counted, and its tokens are not read again."""
        with self.client() as client:
            kept = {info["agent"]: info for info in client.agents()}
        for conversation in self.conversations:
            for turn in conversation.turns:
                assert turn.usage["agentmem"]["committed"]
            for before, after in zip(conversation.turns, conversation.turns[1:], strict=False):
                remembered = before.usage["prompt_tokens"] + before.usage["completion_tokens"]
                # The last sampled token of a reply need not have been run through the model.
                assert after.usage["agentmem"]["exact_tokens"] >= remembered - 1
            if conversation.turns:
                info, last = kept[conversation.agent.name], conversation.turns[-1].usage
                assert info["turns"] >= len(conversation.turns)
                assert info["tokens"] >= last["total_tokens"] - 1
                assert info["state"] in ("warm", "hot")


def talk(run: Run) -> None:
    """The demo until it is complete or the daemon dies."""
    try:
        run.go_on()
    except AgentMemError:
        assert not run.complete


def wait_for(run: Run, turns: int, speaker: threading.Thread) -> None:
    """Until that many turns are answered, so that the moments are spread over the run on any machine."""
    while run.turns < turns:
        assert speaker.is_alive() or run.complete, "the demo ended by itself"
        time.sleep(0.001)


@pytest.mark.slow(minutes=2)
def test_the_demo_killed_at_twenty_moments_ends_like_one_that_was_not(tmp_path: Path) -> None:
    rng, home = random.Random(3), tmp_path / "home"
    # One head in one layer: prefills are short next to replies and commits, so more of the moments fall on those.
    model = save_model(
        tmp_path / "model", num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, hidden_size=64
    )
    undisturbed = Run(tmp_path / "undisturbed", 0)
    daemon = Daemon(undisturbed.home, model, *BUDGET)
    began = time.monotonic()
    undisturbed.go_on()
    one_turn = (time.monotonic() - began) / undisturbed.turns
    assert daemon.stop() == 0

    runs, cut_short = [Run(home, 0)], 0
    for _ in range(KILLS):
        daemon = Daemon(home, model, *BUDGET)
        for run in runs:
            run.check()
        if runs[-1].complete:
            runs.append(Run(home, len(runs)))
        speaker = threading.Thread(target=talk, args=(runs[-1],))
        speaker.start()
        wait_for(runs[-1], rng.randrange(runs[-1].turns, undisturbed.turns), speaker)
        time.sleep(rng.uniform(0, one_turn))
        daemon.kill()
        speaker.join(timeout=60)
        assert not speaker.is_alive()
        cut_short += not runs[-1].complete
    assert cut_short > KILLS // 2, "hardly any run was under way"

    daemon = Daemon(home, model, *BUDGET)
    runs[-1].go_on()
    for run in runs:
        run.check()
        assert run.replies == undisturbed.replies
    assert daemon.get("/v1/store")["disk"]["quarantined"] == 0
    assert daemon.stop() == 0

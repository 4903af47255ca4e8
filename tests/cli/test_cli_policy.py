"""`create`, `quota`, `memory`, `explain`."""

from __future__ import annotations

import pytest

from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

pytestmark = pytest.mark.usefixtures("daemon")

SHORT = ("--max-tokens", "2")


def test_an_agent_is_made_with_a_policy(daemon: Home) -> None:
    made = parse(invoke("create", "vault", "--quota", "512MiB", "--pin", "--json"))["agent"]
    assert (made["quota_bytes"], made["pinned"], made["persist"], made["turns"]) == (512 << 20, True, True, 0)
    invoke("run", "vault", "Hello.", *SHORT)
    assert "537 MB" in next(r for r in invoke("show", "vault").stdout.splitlines() if r.startswith("quota"))
    assert invoke("create", "vault").exit_code == 5
    assert invoke("create", "vault2", "--quota", "much").exit_code == 2
    assert invoke("create", "vault2", "--quota", "0").exit_code == 2
    told = invoke("create", "haze", "--ephemeral", "--encrypt", "off").stdout
    assert told == "haze is made: in RAM only\n"
    invoke("run", "haze", "Hello.", *SHORT)
    assert parse(invoke("show", "haze", "--json"))["agent"]["disk_bytes"] == 0


def test_what_may_be_reused(daemon: Home) -> None:
    assert invoke("create", "mixed", "--reuse", "composed").stdout == "mixed is made: reuse composed\n"
    invoke("run", "mixed", "Hello there, who are you?", *SHORT)
    lines = invoke("explain", "mixed").stdout.splitlines()
    assert any(line.startswith("reuse") and "not composed" in line for line in lines)
    assert (
        parse(invoke("run", "mixed", "And now?", "--reuse", "off", "--json", *SHORT))["usage"]["agentmem"][
            "exact_tokens"
        ]
        == 0
    )
    assert invoke("run", "mixed", "And now?", "--reuse", "much").exit_code == 2


def test_how_prompts_are_composed(daemon: Home) -> None:
    made = invoke("create", "builder", "--reuse", "composed", "--planner", "lego")
    assert made.stdout == "builder is made: reuse composed, planner lego\n"
    assert any(line.split() == ["planner", "lego"] for line in invoke("show", "builder").stdout.splitlines())
    assert invoke("run", "builder", "Hello", "--planner", "kvcomm", *SHORT).exit_code == 0
    assert invoke("run", "builder", "Hello", "--planner", "bricks").exit_code == 2


def test_how_much_of_its_past_an_agent_keeps(daemon: Home) -> None:
    line = ("create", "old", "--memory", "episodic", "--budget-tokens", "8192", "--episodes", "4")
    assert invoke(*line).stdout == "old is made: memory episodic, 8 192 tokens of an episode, 4 episodes\n"
    told = parse(invoke("memory", "old", "window", "--recent", "4096", "--sinks", "8", "--json"))["agent"]
    assert told["policy"] == {"kind": "window", "recent": 4096, "sinks": 8}
    row = next(r for r in invoke("show", "old").stdout.splitlines() if r.startswith("memory"))
    assert row.endswith("window, the first 8 and the newest 4 096 tokens")
    sizes = ("--budget-tokens", "2048", "--block-tokens", "512")
    told = parse(invoke("memory", "old", "episodic", *sizes, "--json"))["agent"]["policy"]
    assert (told["budget_tokens"], told["block_tokens"], told["episodes"]) == (2048, 512, None)
    assert invoke("memory", "old", "full").stdout == "old: memory full\n"
    assert parse(invoke("show", "old", "--json"))["agent"]["policy"] == {"kind": "full"}
    assert invoke("memory", "old", "window", "--recent", "1").exit_code == 2
    assert invoke("memory", "nobody", "full").exit_code == 4


def test_an_agent_is_made_encrypted(daemon: Home) -> None:
    assert "encrypted (file)" in invoke("create", "sealed", "--encrypt", "file").stdout
    assert parse(invoke("show", "sealed", "--json"))["agent"]["encrypted"] == "file"


def test_a_quota_is_given_and_taken_away(daemon: Home) -> None:
    invoke("run", "wide", "Hello.", *SHORT)
    assert parse(invoke("quota", "wide", "1GB", "--json"))["agent"]["quota_bytes"] == 10**9
    assert "no quota of its own" in invoke("quota", "wide", "--none").stdout
    assert parse(invoke("show", "wide", "--json"))["agent"]["quota_bytes"] is None
    assert invoke("quota", "wide").exit_code == 2
    assert invoke("quota", "wide", "1GB", "--none").exit_code == 2
    assert invoke("quota", "nobody", "1GB").exit_code == 4


def test_explain_says_why_and_what_it_cost(daemon: Home) -> None:
    invoke("run", "why", "Hello there, who are you?", *SHORT)
    assert "new_session: the session was new" in invoke("explain", "why").stdout
    invoke("run", "why", "And now?", *SHORT)
    told = parse(invoke("explain", "why", "--json"))
    assert told["reason"] == "extended"
    assert told["exact_tokens"] + told["prefilled_tokens"] == told["prompt_tokens"]
    assert "goes on" in invoke("explain", "why", "--session", "default").stdout
    assert invoke("explain", "why", "--session", "nowhere").exit_code == 4
    assert invoke("explain", "nobody").exit_code == 4

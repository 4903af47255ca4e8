"""`fork`, `pin`, `unpin`, `df`, `prune`, `run --ephemeral`."""

from __future__ import annotations

import pytest

from agentmem.cli.output import format_bytes
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

pytestmark = pytest.mark.usefixtures("daemon")

SHORT = ("--max-tokens", "2")


def test_a_fork_is_listed_with_its_lineage(daemon: Home) -> None:
    invoke("run", "trunk", "The harbour is full of ships. " * 10, *SHORT)
    assert invoke("fork", "trunk", "branch").stdout.startswith("branch: fork of trunk@t1")
    row = next(r for r in invoke("agents").stdout.splitlines() if r.startswith("branch"))
    assert row.rstrip().endswith("fork of trunk@t1")
    assert parse(invoke("fork", "trunk", "twig", "--at", "1", "--json"))["agent"]["lineage"]["turn"] == 1
    assert invoke("fork", "trunk", "branch").exit_code == 5
    assert invoke("fork", "nobody", "x").exit_code == 4
    assert invoke("fork", "trunk", "x", "--at", "7").exit_code == 2
    assert invoke("fork", "trunk", "x", "--at", "0").exit_code == 2


def test_agents_and_df_tell_the_same_bytes(daemon: Home) -> None:
    invoke("run", "oak", "The harbour is full of ships. " * 10, *SHORT)
    invoke("fork", "oak", "acorn")
    store = parse(invoke("df", "--json"))
    assert store["unique_bytes"] < store["without_sharing_bytes"]
    sizes = format_bytes(store["unique_bytes"]), format_bytes(store["without_sharing_bytes"])
    last = invoke("agents").stdout.splitlines()[-1]
    assert f"{sizes[0]} unique ({sizes[1]} without sharing)" in last
    assert f"{sizes[0]} unique ({sizes[1]} without sharing)" in invoke("df").stdout
    assert f"/{format_bytes(store['disk']['budget_bytes'])}" in last
    shown = {a["agent"]: a for a in parse(invoke("agents", "--json"))["agents"]}
    assert shown["oak"]["unique_bytes"] == shown["acorn"]["unique_bytes"] == 0
    assert shown["oak"]["shared_bytes"] == shown["acorn"]["shared_bytes"] > 0


def test_pin_and_unpin_are_shown(daemon: Home) -> None:
    invoke("run", "anchor", "Hello.", *SHORT)
    assert parse(invoke("pin", "anchor", "--json"))["agent"]["pinned"] is True
    assert "pinned" in next(r for r in invoke("agents").stdout.splitlines() if r.startswith("anchor"))
    invoke("unpin", "anchor")
    assert parse(invoke("show", "anchor", "--json"))["agent"]["pinned"] is False


def test_df_shows_budgets_and_sharing(daemon: Home) -> None:
    invoke("run", "trunk", "The harbour is full of ships. " * 10, *SHORT)
    data = parse(invoke("df", "--json"))
    assert data["unique_bytes"] <= data["without_sharing_bytes"]
    text = invoke("df").stdout
    assert "without sharing" in text
    assert "50.0 GiB" in text or "GB" in text
    assert "default" in text


def test_prune_asks_for_an_age_and_can_only_look(daemon: Home) -> None:
    invoke("run", "moss", "Hello, moss.", *SHORT)
    result = parse(invoke("prune", "--older", "0s", "--dry-run", "--json"))
    assert "moss" in result["agents"]
    assert "would be freed" in invoke("prune", "--older", "0s", "--dry-run").stdout
    assert parse(invoke("prune", "--older", "30d", "--json"))["agents"] == []
    assert invoke("prune").exit_code == 2
    assert invoke("prune", "--older", "soon").exit_code == 2


def test_an_ephemeral_agent_is_marked(daemon: Home) -> None:
    invoke("run", "mist", "Hello.", "--ephemeral", *SHORT)
    assert parse(invoke("show", "mist", "--json"))["agent"]["persist"] is False
    assert "ephemeral" in next(r for r in invoke("agents").stdout.splitlines() if r.startswith("mist"))

"""Agents on the command line, against a real daemon: talk, list, show, append, warm, evict, forget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmem.cli.exits import Exit
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

GREEDY = ("--max-tokens", "4", "--temperature", "0")


@pytest.fixture(autouse=True)
def _with_a_daemon(daemon: Home) -> None:
    """Every test here needs one."""


def test_run_streams_the_reply_and_remembers_it() -> None:
    first = invoke("run", "runner", "Say one word.", *GREEDY)
    assert first.exit_code == Exit.OK, first.stderr
    assert first.stdout.strip()
    assert "tokens remembered" in first.stderr

    second = parse(invoke("run", "runner", "And another.", *GREEDY, "--json"))
    assert second["agent"] == "runner"
    assert second["text"]
    assert second["finish_reason"] in ("stop", "length")
    memory = second["usage"]["agentmem"]
    assert memory["state_before"] == "hot"
    assert memory["exact_tokens"] > 0
    assert memory["committed"] is True


def test_run_streams_the_same_text_that_json_reports() -> None:
    spoken = invoke("run", "speaker-a", "Count to three.", *GREEDY)
    reported = parse(invoke("run", "speaker-b", "Count to three.", *GREEDY, "--json"))
    assert spoken.stdout == reported["text"] + "\n"


def test_run_reads_stdin_and_takes_a_system_message() -> None:
    line = ("run", "piped", "-", *GREEDY, "--system", "You are terse.", "--json")
    usage = parse(invoke(*line, stdin="Hello there.\n"))["usage"]
    shorter = parse(invoke("run", "piped-b", "Hello there.\n", *GREEDY, "--json"))["usage"]
    assert usage["prompt_tokens"] != shorter["prompt_tokens"]


def test_sessions_of_an_agent_are_apart() -> None:
    invoke("run", "two-minds", "The word is apple.", *GREEDY, "--session", "one")
    other = parse(invoke("run", "two-minds", "What is the word?", *GREEDY, "--session", "two", "--json"))
    again = parse(invoke("run", "two-minds", "What is the word?", *GREEDY, "--session", "one", "--json"))
    assert again["usage"]["prompt_tokens"] > other["usage"]["prompt_tokens"]
    assert set(parse(invoke("show", "two-minds", "--json"))["agent"]["sessions"]) == {"one", "two"}


def test_chat_reads_lines_and_prints_one_object_each() -> None:
    result = invoke("chat", "talker", *GREEDY, "--json", stdin="Hello.\n\nAnd you?\n")
    assert result.exit_code == Exit.OK, result.stderr
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(replies) == 2
    assert replies[1]["usage"]["agentmem"]["exact_tokens"] >= replies[0]["usage"]["prompt_tokens"]
    assert parse(invoke("show", "talker", "--json"))["agent"]["turns"] == 2


def test_agents_lists_what_show_shows() -> None:
    invoke("run", "listed", "Hello.", *GREEDY)
    listed = {agent["agent"]: agent for agent in parse(invoke("agents", "--json"))["agents"]}
    shown = parse(invoke("show", "listed", "--json"))["agent"]
    assert listed["listed"] == shown
    assert shown["tokens"] > 0
    assert shown["disk_bytes"] > 0

    table = invoke("agents").stdout.splitlines()
    assert table[0].split() == [
        "AGENT",
        "MODEL",
        "TOKENS",
        "UNIQUE",
        "SHARED",
        "STATE",
        "HIT%",
        "SAVED",
        "LAST",
        "LINEAGE",
    ]
    assert any(row.split()[0] == "listed" and shown["model"] in row for row in table[1:])
    assert f"{len(listed)} agent" in table[-1]
    assert shown["model"] in invoke("show", "listed").stdout


def test_append_reads_a_file_without_a_reply(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("The key is under the third stone.")
    usage = parse(invoke("append", "reader", str(path), "--json"))["usage"]
    assert usage["completion_tokens"] == 0
    assert usage["agentmem"]["prefilled_tokens"] > 0
    turn = parse(invoke("run", "reader", "Where is the key?", *GREEDY, "--json"))
    assert turn["usage"]["agentmem"]["exact_tokens"] > 0

    spoken = invoke("append", "reader", "-", "--role", "user", stdin="The gate is green.")
    assert spoken.exit_code == Exit.OK, spoken.stderr
    assert "tokens read" in spoken.stdout


def test_a_file_is_read_in_the_background() -> None:
    job = parse(invoke("append", "later", "-", "--background", "--json", stdin="The gate is green. " * 40))[
        "job"
    ]
    spoken = invoke("append", "later", "-", "--background", stdin="And the door is blue.")
    assert spoken.exit_code == Exit.OK, spoken.stderr
    assert "later will read it; job-" in spoken.stdout
    listed = invoke("jobs")
    assert listed.stdout.splitlines()[0].split() == [
        "JOB",
        "AGENT",
        "SESSION",
        "STATE",
        "READ",
        "OF",
        "SINCE",
        "ERROR",
    ]
    assert job["id"] in listed.stdout
    ended = parse(invoke("jobs", "--cancel", job["id"], "--json"))["jobs"]
    assert [one["state"] in ("done", "cancelled") for one in ended] == [True]
    assert invoke("jobs", "--cancel", job["id"]).stdout.startswith(f"{job['id']}: ")
    assert invoke("jobs", "--cancel", "job-nobody").exit_code == Exit.NOT_FOUND


def test_evict_and_warm_move_an_agent_without_loss() -> None:
    invoke("run", "mover", "Remember the number seven.", *GREEDY)
    before = parse(invoke("show", "mover", "--json"))["agent"]
    assert before["state"] == "hot"
    evicted = parse(invoke("evict", "mover", "--json"))["agent"]
    assert evicted["state"] == "warm"
    assert evicted["ram_bytes"] == 0
    assert evicted["disk_bytes"] == before["disk_bytes"]
    warmed = parse(invoke("warm", "mover", "--json"))["agent"]
    assert warmed["state"] == "hot"
    assert warmed["tokens"] == before["tokens"]

    assert invoke("evict", "mover").stdout.startswith("mover is warm: ")
    assert invoke("warm", "mover").stdout.startswith("mover is hot: ")


def test_forget_deletes_for_good() -> None:
    invoke("run", "gone", "Nobody else says this.", *GREEDY)
    unconfirmed = invoke("forget", "gone")
    assert unconfirmed.exit_code == Exit.USAGE
    assert "--yes" in unconfirmed.stderr
    assert invoke("show", "gone").exit_code == Exit.OK

    forgotten = parse(invoke("forget", "gone", "--yes", "--json"))
    assert forgotten["agent"] == "gone"
    assert forgotten["bytes_freed"] > 0
    assert invoke("show", "gone").exit_code == Exit.NOT_FOUND


def test_forget_one_session() -> None:
    for session in ("goes", "stays"):
        invoke("run", "both", "Nobody else says this.", "--session", session, *GREEDY)
    unconfirmed = invoke("forget", "both", "--session", "goes")
    assert unconfirmed.exit_code == Exit.USAGE
    forgotten = invoke("forget", "both", "--session", "goes", "--yes")
    assert forgotten.stdout.startswith("session goes of both is forgotten, ")
    assert parse(invoke("show", "both", "--json"))["agent"]["sessions"] == ["stays"]
    assert invoke("forget", "both", "--session", "goes", "--yes").exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize("line", [("show",), ("warm",), ("evict",), ("forget", "--yes")], ids=lambda x: x[0])
def test_an_unknown_agent_is_not_found(line: tuple[str, ...]) -> None:
    result = invoke(*line, "nobody", "--json")
    assert result.exit_code == Exit.NOT_FOUND
    assert "nobody" in parse(result)["error"]["message"]


@pytest.mark.parametrize("name", ["a/b", "..", "a" * 200, "-x y"])
def test_an_illegal_name_is_refused_as_usage(name: str) -> None:
    result = invoke("run", "--json", "--", name, "hello")
    assert result.exit_code == Exit.USAGE


def test_a_text_longer_than_the_context_is_refused() -> None:
    result = invoke("append", "overfull", "-", "--json", stdin="word " * 20_000)
    assert result.exit_code == Exit.REFUSED
    assert parse(result)["error"]["code"] == "context_length_exceeded"
    assert invoke("show", "overfull").exit_code == Exit.NOT_FOUND


def test_models_names_what_is_served() -> None:
    found = parse(invoke("models", "--json"))["models"]
    assert [model["id"] for model in found] == invoke("models").stdout.split()
    assert found[0]["id"] == parse(invoke("status", "--json"))["model"]

"""What an agent keeps, where it lies, and what is left of it when it is evicted or forgotten."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from agentmem.errors import ModelUnavailable, NotFound
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.runtime.agents import BUDGET, LONG, Running, ask, cached, extents, memory, open_runtime, turn


def test_agents_and_sessions_survive_reopening(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    turn(runtime, "ada", "two", session="side")
    turn(runtime, "bob", "hello")
    before = runtime.agents()
    runtime.close()
    runtime = open_runtime(tmp_path)
    after = runtime.agents()
    assert [a["agent"] for a in after] == ["ada", "bob"]
    for a, b in zip(before, after, strict=True):
        assert (a["state"], b["state"]) == ("hot", "warm")
        assert b["ram_bytes"] == 0
        same = (
            "agent",
            "sessions",
            "tokens",
            "turns",
            "disk_bytes",
            "fp16_bytes",
            "created",
            "last_used",
            "prompt_tokens",
        )
        assert {k: a[k] for k in same} == {k: b[k] for k in same}  # type: ignore[literal-required]
    last = turn(runtime, "ada", "go on")
    assert memory(last)["state_before"] == "warm"
    assert (
        memory(last)["restored_tokens"]
        == cached(last)
        == last.usage["prompt_tokens"] - memory(last)["prefilled_tokens"]
    )
    assert memory(last)["prefilled_tokens"] < 60
    runtime.close()


def test_sessions_of_an_agent_are_independent(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG, session="one")
    other = turn(runtime, "ada", "entirely different words", session="two")
    assert other.usage["prompt_tokens"] < 80
    again = turn(runtime, "ada", "more", session="one")
    assert again.usage["prompt_tokens"] > len(LONG)
    assert turn(runtime, "ada", "more", session="two").usage["prompt_tokens"] < 160
    assert runtime.agent("ada")["sessions"] == ["one", "two"]
    assert runtime.explain("ada", "one")["turn"] == 2
    with pytest.raises(NotFound):
        runtime.explain("ada", "three")
    runtime.close()


def test_namespaces_share_nothing(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG, namespace="red")
    assert cached(turn(runtime, "bob", LONG, namespace="red")) > 300
    assert cached(turn(runtime, "ada", LONG, namespace="blue")) == 0
    assert cached(turn(runtime, "bob", LONG)) == 0
    assert [a["agent"] for a in runtime.agents("blue")] == ["ada"]
    with pytest.raises(NotFound):
        runtime.agent("bob", "blue")
    runtime.forget("ada", "red")
    assert runtime.agent("ada", "blue")["turns"] == 1
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "ada", "go on", namespace="blue")) > 300
    assert cached(turn(runtime, "ada", LONG, namespace="green")) == 0
    runtime.close()


def test_evict_frees_ram_and_forget_frees_all(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    turn(runtime, "ada", "and then?")
    used = runtime.store()["ram"]["used_bytes"]
    assert used == runtime.agent("ada")["ram_bytes"] > 0
    assert runtime.evict("ada")["state"] == "warm"
    assert runtime.store()["ram"]["used_bytes"] == 0
    assert runtime.warm("ada")["state"] == "hot"
    assert runtime.store()["ram"]["used_bytes"] == used
    assert cached(turn(runtime, "ada", "why?")) > 300
    runtime.evict("ada")  # waits until nothing is being written
    on_disk = sum(p.stat().st_size for p in extents(tmp_path))
    assert runtime.forget("ada") == {"agent": "ada", "bytes_freed": on_disk}
    check(runtime)
    assert runtime.store()["ram"]["used_bytes"] == 0
    assert runtime.agents() == []
    assert extents(tmp_path) == []
    with pytest.raises(NotFound):
        runtime.forget("ada")
    runtime.close()
    index = (tmp_path / "store" / "index.sqlite").read_bytes()
    assert b"lamp keeper" not in index


def test_forget_reaches_what_was_said_before_an_edit(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    for text in (LONG, "short", LONG[::-1]):
        request = ask("ada", text, history="client")
        turn(runtime, "ada", text, history="client")
        assert request.history == "client"
    runtime.forget("ada")
    check(runtime)
    assert runtime.store()["ram"]["used_bytes"] == 0
    assert extents(tmp_path) == []
    runtime.close()


def test_forget_leaves_what_others_share(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    turn(runtime, "bob", LONG + "what else?")
    runtime.forget("ada")
    check(runtime)
    assert runtime.agent("bob")["state"] == "hot"
    runtime.evict("bob")
    last = turn(runtime, "bob", "go on")
    assert cached(last) > 400
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "bob", "go on")) > 400
    runtime.close()


def check(runtime: Runtime) -> None:
    """The pool's own integrity check, on the engine thread."""
    runtime._call(runtime._pool.check)


def test_files_are_private(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path / "home")
    turn(runtime, "ada", LONG)
    for path in [tmp_path / "home", *(tmp_path / "home").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    runtime.close()


def test_append_then_chat_continues_from_it(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    usage = runtime.append(ask("ada", LONG))
    assert usage["completion_tokens"] == 0
    assert usage["agentmem"]["committed"]
    assert usage["agentmem"]["prefilled_tokens"] == usage["prompt_tokens"] > len(LONG)
    first = turn(runtime, "ada", "so?")
    assert cached(first) == usage["prompt_tokens"]
    runtime.close()
    runtime = open_runtime(tmp_path)
    again = runtime.append(ask("ada", "another note"))
    assert again["prompt_tokens_details"]["cached_tokens"] >= first.usage["prompt_tokens"]
    assert runtime.agent("ada")["turns"] == 3
    runtime.close()


def test_appending_in_pieces_is_chatting_over_the_whole(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    runtime.append(ask("ada", LONG))
    runtime.append(ask("ada", "second note"))
    pieces = turn(runtime, "ada", "so?")
    messages = [{"role": "user", "content": t} for t in (LONG, "second note", "so?")]
    fresh = open_runtime(tmp_path / "other")
    request = ask("bob", "", history="client")
    request.messages = messages
    whole = Running(fresh, request).end()
    assert pieces.usage["prompt_tokens"] == whole.usage["prompt_tokens"]
    runtime.close()
    fresh.close()


@pytest.mark.parametrize("policy", ["batched", "none"])
def test_loose_commit_policies_do_not_promise_but_keep_after_a_clean_stop(
    tmp_path: Path, policy: str
) -> None:
    runtime = open_runtime(tmp_path, commit=policy)
    first = turn(runtime, "ada", LONG)
    assert not memory(first)["committed"]
    second = turn(runtime, "ada", "and then?")
    assert cached(second) > 300
    runtime.close()
    runtime = open_runtime(tmp_path, commit=policy)
    assert runtime.agent("ada")["turns"] == 2
    assert cached(turn(runtime, "ada", "go on")) >= second.usage["prompt_tokens"]
    runtime.close()


def test_a_full_disk_delays_the_log_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        unwritten = [turn(runtime, "ada", text) for text in ("one", "two")]
        assert not any(memory(t)["committed"] for t in unwritten)
        assert runtime.health()["status"] == "degraded"
    last = turn(runtime, "ada", "three")
    assert memory(last)["committed"]
    assert runtime.health()["status"] == "ok"
    assert cached(last) >= unwritten[-1].usage["prompt_tokens"]
    tokens = runtime.agent("ada")["tokens"]
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert runtime.agent("ada")["tokens"] == tokens
    assert runtime.agent("ada")["turns"] == 4
    after = turn(runtime, "ada", "four")
    assert cached(after) >= last.usage["prompt_tokens"]
    assert after.usage["prompt_tokens"] > len(LONG) + 4 * 30
    runtime.close()


def test_an_fsync_error_is_told_and_serving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = open_runtime(tmp_path)
    kept = turn(runtime, "ada", LONG)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        assert not memory(turn(runtime, "ada", "one"))["committed"]
    assert runtime.health()["status"] == "degraded"
    assert "Input/output error" in runtime.health()["store"]["problem"]
    after = turn(runtime, "ada", "two")
    assert not memory(after)["committed"]
    assert cached(after) > 300
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert runtime.health()["status"] == "ok"
    assert runtime.agent("ada")["turns"] == 1
    assert cached(turn(runtime, "ada", "one")) >= kept.usage["prompt_tokens"]
    runtime.close()


def test_another_model_or_format_sees_words_but_no_state(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    first = turn(runtime, "ada", LONG)
    runtime.close()
    settings = Settings(home=tmp_path, ram_budget=ByteSize(BUDGET))
    openings: list[Callable[[], Runtime]] = [
        lambda: Runtime.open(settings, lambda: random_model("llama", seed=1)),
        lambda: open_runtime(tmp_path, kv_format="q8-plain"),
        lambda: open_runtime(tmp_path, page_tokens=32),
    ]
    for opening in openings:
        other = opening()
        reply = turn(other, "ada", "go on")
        assert cached(reply) == 0
        assert reply.usage["prompt_tokens"] > first.usage["prompt_tokens"]
        other.close()
    runtime = open_runtime(tmp_path)
    assert runtime.agent("ada")["turns"] == 4
    assert turn(runtime, "ada", "and?").text
    runtime.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ram_budget": 1000}, "ram_budget 1000 bytes holds 0"),
        ({"kv_format": "q5"}, "unknown kv_format 'q5'"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        open_runtime(tmp_path, **options)

"""Damaged extents: agents answer all the same, files are put aside, lost rows are written again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.agents import (
    LONG,
    Running,
    ask,
    cached,
    extents,
    memory,
    open_runtime,
    quarantined,
    turn,
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"__metadata__":{}}' + b"\0" * 5000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [truncate, flip, delete, replace, empty, folder]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The replies of a home that nothing happened to."""
    runtime = open_runtime(tmp_path_factory.mktemp("undisturbed"))
    replies = [turn(runtime, "ada", t).text for t in (LONG, "and then?", "why?", "go on")]
    runtime.close()
    return replies


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True], ids=["evicted", "restarted"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_first_extent_costs_time_and_nothing_else(
    tmp_path: Path, undisturbed: list[str], damage: Callable[[Path], None], restart: bool
) -> None:
    runtime = open_runtime(tmp_path)
    assert turn(runtime, "ada", LONG).text == undisturbed[0]
    (first,) = extents(tmp_path)
    whole = turn(runtime, "ada", "and then?")
    assert whole.text == undisturbed[1]
    assert cached(whole) > 300
    if restart:
        runtime.close()
        runtime = open_runtime(tmp_path)
    else:
        runtime.evict("ada")
    damage(first)

    after = turn(runtime, "ada", "why?")
    assert after.text == undisturbed[2]
    assert cached(after) == 0
    assert memory(after)["prefilled_tokens"] == after.usage["prompt_tokens"]
    assert memory(after)["committed"]
    assert memory(after)["state_before"] == "cold"
    assert runtime.explain("ada")["reason"] == "quarantined"
    assert runtime.store()["disk"]["quarantined"] >= 1
    assert not runtime.store()["disk"]["read_only"]
    assert (first.name in quarantined(tmp_path)) == (damage is not delete)
    assert not first.exists()

    runtime.close()
    runtime = open_runtime(tmp_path)
    last = turn(runtime, "ada", "go on")
    assert last.text == undisturbed[3]
    assert memory(last)["state_before"] == "warm"
    assert cached(last) >= after.usage["prompt_tokens"]
    assert runtime.agent("ada")["turns"] == 4
    runtime.close()


def test_damage_to_a_later_extent_leaves_the_rows_before_it(tmp_path: Path, undisturbed: list[str]) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    (first,) = extents(tmp_path)
    turn(runtime, "ada", "and then?")
    (second,) = set(extents(tmp_path)) - {first}
    runtime.evict("ada")
    flip(second)
    after = turn(runtime, "ada", "why?")
    assert after.text == undisturbed[2]
    assert 300 < cached(after) < after.usage["prompt_tokens"] - 20
    assert quarantined(tmp_path) == [second.name]
    runtime.evict("ada")
    assert turn(runtime, "ada", "go on").text == undisturbed[3]
    runtime.close()


@pytest.mark.parametrize("damage", [flip, delete])
def test_agents_that_share_a_damaged_extent_ask_at_the_same_time(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "first", LONG, max_tokens=1)
    (shared,) = extents(tmp_path)
    names = [f"a{i}" for i in range(4)]
    for name in names:
        assert cached(turn(runtime, name, LONG, max_tokens=1)) > 300
    runtime.close()
    runtime = open_runtime(tmp_path)
    damage(shared)
    running = [Running(runtime, ask(name, "why?")) for name in names for _ in range(2)]
    replies = [r.end() for r in running]
    assert all(memory(r)["committed"] for r in replies)
    runtime.close()
    runtime = open_runtime(tmp_path)
    for name in names:
        assert cached(turn(runtime, name, "and now?")) > 300
        assert runtime.agent(name)["turns"] == 4
    assert not runtime.store()["disk"]["read_only"]
    runtime.close()


def test_warming_a_damaged_agent_tells_that_it_is_not_hot(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    runtime.evict("ada")
    flip(extents(tmp_path)[0])
    assert runtime.warm("ada")["state"] == "cold"
    assert cached(turn(runtime, "ada", "why?")) == 0
    assert runtime.agent("ada")["state"] == "hot"
    runtime.close()


def test_pages_kept_in_ram_by_another_agent_outlive_their_damaged_file(tmp_path: Path) -> None:
    """Their rows are still there: the next turn over them writes them again."""
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    (first,) = extents(tmp_path)
    turn(runtime, "bob", LONG + "what else?")
    runtime.evict("ada")
    flip(first)
    runtime.warm("ada")
    runtime.close()
    assert quarantined(tmp_path) == [first.name]
    runtime = open_runtime(tmp_path)
    assert runtime.warm("bob")["agent"] == "bob"
    assert turn(runtime, "bob", "why?").finish_reason
    runtime.evict("bob")
    assert cached(turn(runtime, "bob", "go on")) > 300
    runtime.close()


def test_warming_while_a_turn_restores_the_same_damaged_pages(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    turn(runtime, "bob", LONG)
    runtime.close()
    runtime = open_runtime(tmp_path)
    flip(extents(tmp_path)[0])
    threads = [threading.Thread(target=runtime.warm, args=(name,)) for name in ("ada", "bob") * 3]
    for thread in threads:
        thread.start()
    replies = [Running(runtime, ask(name, "why?")) for name in ("ada", "bob")]
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert all(r.end().text for r in replies)
    runtime.close()

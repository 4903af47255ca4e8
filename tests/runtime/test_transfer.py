"""Agents as files: what a round trip keeps, where it may go, and that it is whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.verify import verify
from agentmem.engine.request import ChatRequest
from agentmem.errors import AlreadyExists, BadRequest, NotFound, StoreError
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.runtime.agents import BUDGET, LONG, Running, cached, extents, memory, turn
from tests.runtime.archives import changed

Opened = Callable[..., Runtime]
Carried = Callable[[Runtime, str], Path]

NEXT = "and what did the keeper write down on the third night?"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Runtime]]:
    """Opens runtimes on homes by name; all are closed in the end."""
    runtimes: list[Runtime] = []

    def run(name: str, model: Callable[[], LoadedModel] | None = None, **options: Any) -> Runtime:
        settings = Settings(home=tmp_path / name, **{"ram_budget": BUDGET, **options})
        runtimes.append(Runtime.open(settings, model or (lambda: random_model("llama", seed=0))))
        return runtimes[-1]

    yield run
    for runtime in runtimes:
        runtime.close()


@pytest.fixture
def carried(tmp_path: Path) -> Callable[[Runtime, str], Path]:
    """Exports an agent into a file of its own."""

    def run(runtime: Runtime, agent: str) -> Path:
        path = tmp_path / f"{agent}.safetensors"
        with runtime.transfer.export(agent) as file:
            path.write_bytes(file.read())
        return path

    return run


def admit(runtime: Runtime, path: Path, name: str | None = None, **options: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        return runtime.transfer.admit(file, name, **options)


def talk(runtime: Runtime, agent: str = "ada") -> None:
    """Two sessions with a common beginning, one of them edited."""
    turn(runtime, agent, LONG)
    turn(runtime, agent, "go on")
    turn(runtime, agent, LONG, session="side")
    turn(runtime, agent, "and then", session="side", max_tokens=3)


@pytest.mark.parametrize("kv_format", ["q4", "fp16"])
def test_round_trip_continues_like_the_uninterrupted_run(
    opened: Opened, carried: Carried, kv_format: str
) -> None:
    here, there = opened("here", kv_format=kv_format), opened("there", kv_format=kv_format)
    talk(here)
    result = admit(there, carried(here, "ada"))
    assert (result["kept"], result["agent"], result["pages_shared"]) == ("state", "ada", 0)
    before, after = here.agent("ada"), there.agent("ada")
    same = ("agent", "sessions", "tokens", "turns", "fp16_bytes", "prompt_tokens", "cached_tokens", "created")
    assert {k: before[k] for k in same} == {k: after[k] for k in same}
    assert after["state"] == "warm"
    assert here.explain("ada", "side")["reason"] == there.explain("ada", "side")["reason"]
    for session in ("default", "side"):
        one = turn(here, "ada", NEXT, session=session, max_tokens=12)
        two = turn(there, "ada", NEXT, session=session, max_tokens=12)
        assert one.text == two.text
        assert cached(one) == cached(two) > 300
    assert memory(two)["restored_tokens"] > 0


def test_an_import_survives_a_restart(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    admit(there, carried(here, "ada"), "bob")
    there.close()
    there = opened("there")
    assert there.agent("bob")["state"] == "warm"
    one, two = turn(here, "ada", NEXT), turn(there, "bob", NEXT)
    assert (one.text, cached(one)) == (two.text, cached(two))
    there.close()
    there = opened("there")
    one, two = turn(here, "ada", "once more"), turn(there, "bob", "once more")
    assert (one.text, cached(one)) == (two.text, cached(two))


@pytest.mark.slow
def test_an_agent_larger_than_ram_travels(opened: Opened, carried: Carried) -> None:
    here, there = opened("here", ram_budget=2 << 20), opened("there")
    for session in range(12):
        turn(here, "ada", f"{session} {LONG}", session=f"s{session}", max_tokens=1)
    assert here.agent("ada")["state"] == "warm"
    assert here.agent("ada")["fp16_bytes"] > 2 * (2 << 20)
    admit(there, carried(here, "ada"))
    for session in ("s0", "s11"):
        one, two = (turn(r, "ada", NEXT, session=session) for r in (here, there))
        assert (one.text, cached(one)) == (two.text, cached(two))


def test_other_agents_never_continue_from_imported_state(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    admit(there, carried(here, "ada"))
    first = turn(there, "eve", LONG)
    assert cached(first) == 0
    assert cached(turn(there, "eve", LONG, session="again")) > 300
    turn(there, "ada", NEXT)
    assert cached(turn(there, "eve", LONG, session="third")) > 300
    there.forget("eve")
    assert cached(turn(there, "bob", LONG)) == 0


def test_trusted_state_is_shared(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    path = carried(here, "ada")
    result = admit(there, path, trust=True)
    assert result["pages_shared"] == 0
    assert cached(turn(there, "eve", LONG)) > 300
    again = admit(there, path, "second", trust=True)
    assert again["pages_shared"] == again["pages"] == result["pages"]
    assert again["bytes_written"] == 0
    there.forget("ada")
    one, two = turn(here, "ada", NEXT), turn(there, "second", NEXT)
    assert (one.text, cached(one)) == (two.text, cached(two))


def test_trusted_pages_with_other_bytes_are_not_shared(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there", chunk_tokens=16)
    turn(here, "ada", LONG)
    turn(there, "eve", LONG)
    result = admit(there, carried(here, "ada"), trust=True)
    assert result["pages_shared"] < result["pages"]
    one, two = turn(here, "ada", NEXT), turn(there, "ada", NEXT)
    assert (one.text, cached(one)) == (two.text, cached(two))


@pytest.mark.parametrize("options", [{"kv_format": "q8-plain"}, {"page_tokens": 32}])
def test_another_fingerprint_keeps_the_tokens(
    opened: Opened, carried: Carried, options: dict[str, Any]
) -> None:
    here, there = opened("here"), opened("there", **options)
    talk(here)
    assert admit(there, carried(here, "ada"))["kept"] == "tokens"
    info = there.agent("ada")
    assert (info["state"], info["tokens"]) == ("cold", here.agent("ada")["tokens"])
    first = turn(there, "ada", NEXT)
    assert cached(first) == 0
    assert first.usage["prompt_tokens"] == turn(here, "ada", NEXT).usage["prompt_tokens"]
    assert cached(turn(there, "ada", "more")) >= first.usage["prompt_tokens"]
    assert cached(turn(there, "eve", LONG)) > 0


def other_text() -> LoadedModel:
    """The same model behind a tokenizer of another name."""
    model = random_model("llama", seed=0)
    return dataclasses.replace(model, identity={**model.identity, "tokenizer": "another"})


def test_another_tokenizer_keeps_the_messages(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there", other_text)
    talk(here)
    assert admit(there, carried(here, "ada"))["kept"] == "messages"
    info = there.agent("ada")
    assert (info["state"], info["tokens"], info["turns"]) == ("cold", 0, 4)
    first = turn(there, "ada", NEXT)
    assert cached(first) == 0
    assert first.usage["prompt_tokens"] > 400
    assert turn(there, "ada", "go on", session="side").usage["prompt_tokens"] > 400


def test_names_that_are_taken(opened: Opened, carried: Carried) -> None:
    runtime = opened("here")
    talk(runtime)
    path = carried(runtime, "ada")
    with pytest.raises(AlreadyExists):
        admit(runtime, path)
    admit(runtime, path, "copy")
    assert cached(turn(runtime, "copy", NEXT)) > 300
    turn(runtime, "ada", "something else", session="third")
    admit(runtime, path, force=True)
    assert runtime.agent("ada")["sessions"] == ["default", "side"]
    one, two = turn(runtime, "ada", "last"), turn(runtime, "ada", "last", session="side")
    assert cached(one) > 300
    assert cached(two) > 300
    assert [a["agent"] for a in runtime.agents()] == ["ada", "copy"]


def test_forgetting_an_import_leaves_nothing(opened: Opened, carried: Carried, tmp_path: Path) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    path = carried(here, "ada")
    admit(there, path)
    turn(there, "ada", NEXT)
    assert there.forget("ada")["bytes_freed"] > 0
    assert extents(tmp_path / "there") == []
    assert there.store()["ram"]["used_bytes"] == 0
    admit(there, path)


@pytest.mark.slow
@pytest.mark.parametrize("odd", [{"role": "oracle"}, {"role": "user", "name": "bob"}])
def test_a_log_that_archives_do_not_hold(opened: Opened, odd: dict[str, str]) -> None:
    runtime = opened("here")
    Running(runtime, ChatRequest("ada", [{"content": "Swordfish", **odd}])).end()
    with pytest.raises(BadRequest, match="cannot be exported") as error:
        runtime.transfer.export("ada")
    assert "Swordfish" not in error.value.message


def test_nothing_to_export(opened: Opened) -> None:
    with pytest.raises(NotFound):
        opened("here").transfer.export("nobody")


def test_imports_leave_the_floor_of_the_disk_free(opened: Opened, carried: Carried, tmp_path: Path) -> None:
    here, there = opened("here"), opened("there", disk_floor=1 << 60)
    talk(here)
    path = carried(here, "ada")
    with pytest.raises(StoreError, match="disk_floor"):
        admit(there, path)
    assert extents(tmp_path / "there") == []
    assert there.agents() == []


@pytest.mark.slow
def test_imports_stay_within_the_disk_budget(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there", disk_budget=1 << 20)
    for session in range(12):
        turn(here, "ada", f"{session} {LONG}", session=f"s{session}", max_tokens=1)
    path = carried(here, "ada")
    assert path.stat().st_size > 1 << 20
    admit(there, path)
    deadline = time.monotonic() + 30
    while there.store()["disk"]["bytes"] > 1 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there.store()["disk"]["bytes"] <= 1 << 20
    assert there.agent("ada")["tokens"] == here.agent("ada")["tokens"]
    for session in ("s0", "s11"):
        assert turn(there, "ada", NEXT, session=session).usage["prompt_tokens"] > 400


def test_no_room_for_an_archive(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = opened("here")
    talk(runtime)
    before = sorted(os.listdir(tmp_path / "here" / "store"))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="no space"):
            runtime.transfer.export("ada")
    assert sorted(os.listdir(tmp_path / "here" / "store")) == before
    runtime.transfer.export("ada").close()
    assert runtime.forget("ada")["bytes_freed"] > 0


def test_a_full_disk_leaves_no_trace(
    opened: Opened, carried: Carried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    path = carried(here, "ada")
    turn(there, "eve", "hello")
    before = sorted(os.listdir(tmp_path / "there" / "store")), extents(tmp_path / "there")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(StoreError, match="no space"):
            admit(there, path)
    assert (sorted(os.listdir(tmp_path / "there" / "store")), extents(tmp_path / "there")) == before
    assert [a["agent"] for a in there.agents()] == ["eve"]
    assert turn(there, "eve", "again").usage["agentmem"]["committed"]
    assert admit(there, path)["kept"] == "state"
    assert turn(there, "ada", NEXT).text == turn(here, "ada", NEXT).text


def test_an_agent_that_does_not_persist_travels(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    turn(here, "ada", LONG, persist=False)
    turn(here, "ada", "go on")
    admit(there, carried(here, "ada"))
    there.close()
    there = opened("there")
    one, two = turn(here, "ada", NEXT), turn(there, "ada", NEXT)
    assert (one.text, cached(one)) == (two.text, cached(two))


def test_policies_travel_and_pin_and_reuse_count_where_trusted(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    turn(here, "ada", LONG)
    here.set_policy("ada", {"pinned": True, "quota_bytes": 1 << 40, "reuse": "auto", "planner": "lego"})
    path = carried(here, "ada")
    admit(there, path, "guest")
    admit(there, path, "friend", trust=True)
    there.close()
    there = opened("there")
    fields = ("pinned", "quota_bytes", "reuse", "planner", "persist")
    known = {a["agent"]: tuple(a[f] for f in fields) for a in there.agents()}
    assert known == {
        "guest": (False, 1 << 40, "exact", "kvcomm+tail", True),
        "friend": (True, 1 << 40, "auto", "lego", True),
    }


def test_a_quota_that_comes_along_is_kept(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    turn(here, "ada", LONG)
    here.set_policy("ada", {"quota_bytes": 1})
    path = carried(here, "ada")
    turn(there, "eve", LONG)
    own = there.agent("eve")["disk_bytes"]
    admit(there, path)
    there.close()
    there = opened("there")
    assert (there.agent("ada")["state"], there.agent("eve")["disk_bytes"]) == ("cold", own)
    assert turn(there, "ada", NEXT).usage["prompt_tokens"] > 300


def test_archives_without_policies_are_read(opened: Opened, carried: Carried, tmp_path: Path) -> None:
    here, there = opened("here"), opened("there")
    turn(here, "ada", LONG)
    path = changed(carried(here, "ada"), tmp_path / "older", lambda c: c.manifest.pop("policy"))
    assert admit(there, path)["kept"] == "state"


def test_forks_travel_alone_and_of_imports_stay_apart(opened: Opened, carried: Carried) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    here.fork("ada", "twin", session="default", at=1)
    turn(here, "twin", "another way")
    admit(there, carried(here, "twin"))
    one, two = turn(here, "twin", NEXT), turn(there, "twin", NEXT)
    assert (one.text, cached(one)) == (two.text, cached(two))
    there.fork("twin", "triplet")
    assert cached(turn(there, "triplet", "on")) > 300
    assert cached(turn(there, "eve", LONG)) == 0
    there.forget("twin")
    there.close()
    there = opened("there")
    assert cached(turn(there, "triplet", "and on")) > 300


@pytest.mark.slow
def test_an_import_is_merged_and_verified(opened: Opened, carried: Carried, tmp_path: Path) -> None:
    here, there = opened("here"), opened("there")
    talk(here)
    admit(there, carried(here, "ada"))
    for number in range(12):
        one, two = (turn(r, "ada", f"and {number}?", max_tokens=2) for r in (here, there))
        assert one.text == two.text
    there.close()
    report = verify(tmp_path / "there" / "store", deep=True)
    assert report.ok, report
    assert report.orphans == []


def test_nobody_speaks_as_an_agent_that_is_on_its_way_in(opened: Opened) -> None:
    runtime = opened("here")
    runtime._call(lambda: runtime._memory.reserved.add(("default", "ada")))
    with pytest.raises(AlreadyExists, match="being imported"):
        turn(runtime, "ada", "hello")
    runtime._call(lambda: runtime._memory.reserved.clear())
    assert turn(runtime, "ada", "hello").usage["agentmem"]["committed"]

"""Encrypted agents: what lies on the disk is ciphertext, and without its key an agent is locked and everything else as before."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import AgentLocked, StoreError
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.blockpool.keychain import MemoryKeyring, installed
from tests.runtime.agents import BUDGET, LONG, cached, extents, memory, quarantined, turn

MARKER = "the password of the lighthouse is Swordfish-4711"
TEXT = f"{MARKER}; {LONG}"

Opened = Callable[..., Runtime]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens runtimes on homes by name; all are closed in the end."""
    runtimes: list[Runtime] = []

    def run(name: str, **options: Any) -> Runtime:
        settings = Settings(home=tmp_path / name, **{"ram_budget": BUDGET, "encrypt": "file", **options})
        runtimes.append(Runtime.open(settings, lambda: random_model("llama", seed=0)))
        return runtimes[-1]

    yield run
    for runtime in runtimes:
        runtime.close()


def keys(home: Path) -> list[Path]:
    return sorted((home / "keys").iterdir()) if (home / "keys").exists() else []


def holds(home: Path, text: str, *, but: str = "models") -> list[str]:
    """Files of a home in which `text` lies: as it is, or as the token ids of the byte tokenizer in any width."""
    widths = [text.encode(), *(text.encode(f"utf-{bits}-le") for bits in (16, 32))]
    return sorted(
        str(p.relative_to(home))
        for p in home.rglob("*")
        if p.is_file() and but not in p.parts and any(w in p.read_bytes() for w in widths)
    )


def talk(runtime: Runtime, agent: str = "ada") -> str:
    turn(runtime, agent, TEXT)
    turn(runtime, agent, "go on", session="side")
    return turn(runtime, agent, "and then?").text


def test_encryption_changes_nothing_but_the_disk(opened: Opened, tmp_path: Path) -> None:
    plain, sealed = opened("plain", encrypt="off"), opened("sealed")
    assert talk(plain) == talk(sealed)
    assert (plain.agent("ada")["encrypted"], sealed.agent("ada")["encrypted"]) == ("off", "file")
    sealed.close()
    sealed = opened("sealed")
    assert sealed.agent("ada")["state"] == "warm"
    one, two = turn(plain, "ada", "last"), turn(sealed, "ada", "last")
    assert (one.text, cached(one)) == (two.text, cached(two))
    assert memory(two)["restored_tokens"] > 300
    assert len(keys(tmp_path / "sealed")) == 1
    assert keys(tmp_path / "plain") == []


@pytest.mark.parametrize("closed", [False, True])
def test_nothing_that_was_said_lies_on_the_disk(opened: Opened, tmp_path: Path, closed: bool) -> None:
    plain, sealed = opened("plain", encrypt="off"), opened("sealed")
    for runtime in (plain, sealed):
        talk(runtime)
        runtime.fork("ada", "twin")
        turn(runtime, "twin", MARKER)
        if closed:
            runtime.close()
    assert holds(tmp_path / "plain", MARKER), "the search finds what is there"
    assert holds(tmp_path / "sealed", MARKER) == []


def test_encrypted_agents_share_nothing(opened: Opened) -> None:
    runtime = opened("home")
    turn(runtime, "ada", LONG)
    assert cached(turn(runtime, "bob", LONG)) == 0
    assert cached(turn(runtime, "ada", LONG, session="two")) > 300


def test_settings_change_for_new_agents_only(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home", encrypt="off")
    turn(runtime, "old", LONG)
    runtime.close()
    runtime = opened("home")
    turn(runtime, "new", TEXT)
    runtime.close()
    runtime = opened("home", encrypt="off")
    assert [a["encrypted"] for a in runtime.agents()] == ["file", "off"]
    assert cached(turn(runtime, "new", "go on")) > 300
    assert cached(turn(runtime, "old", "go on")) > 300
    assert holds(tmp_path / "home", MARKER) == []


def test_an_agent_that_never_spoke_leaves_no_key(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home")
    with pytest.raises(Exception, match="context"):
        turn(runtime, "ada", "x " * 9000)
    assert runtime.agents() == []
    assert keys(tmp_path / "home") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "wrong", "short"])
def test_without_its_key_an_agent_is_locked(opened: Opened, tmp_path: Path, damage: str) -> None:
    home = tmp_path / "home"
    runtime = opened("home")
    talk(runtime)
    runtime.fork("ada", "twin")
    talk(runtime, "bob")
    runtime.close()
    runtime = opened("home", encrypt="off")
    turn(runtime, "eve", LONG)
    runtime.close()
    kept = extents(home)
    by_agent = {p.name: p.read_bytes() for p in keys(home)}
    assert len(by_agent) == 2
    space = next(iter(by_agent))
    content = {"missing": None, "wrong": bytes(32), "short": b"x"}[damage]
    if content is None:
        (home / "keys" / space).unlink()
    else:
        (home / "keys" / space).write_bytes(content)

    runtime = opened("home", encrypt="off")
    locked = [a["agent"] for a in runtime.agents() if a["locked"]]
    assert locked in (["ada", "twin"], ["bob"])
    for agent in locked:
        assert runtime.agent(agent)["state"] == "cold"
        assert runtime.agent(agent)["sessions"] == ["default", "side"] if agent != "twin" else True
        for refused in (
            lambda: turn(runtime, agent, "hello?"),  # noqa: B023
            lambda: runtime.transfer.export(agent),  # noqa: B023
            lambda: runtime.fork(agent, "another"),  # noqa: B023
        ):
            with pytest.raises(AgentLocked, match="key is not there"):
                refused()
    assert set(kept) <= set(extents(home))
    for agent in {"ada", "bob", "eve"} - set(locked):
        assert cached(turn(runtime, agent, "still there?")) > 300
    assert runtime.health()["status"] == "ok"
    runtime.close()
    assert quarantined(home) == []

    (home / "keys" / space).write_bytes(by_agent[space])
    runtime = opened("home", encrypt="off")
    assert not any(a["locked"] for a in runtime.agents())
    for agent in locked:
        assert cached(turn(runtime, agent, "and now?")) > 300


def test_a_locked_agent_can_be_forgotten(opened: Opened, tmp_path: Path) -> None:
    home = tmp_path / "home"
    runtime = opened("home")
    talk(runtime)
    runtime.close()
    keys(home)[0].unlink()
    runtime = opened("home")
    assert runtime.forget("ada")["bytes_freed"] > 0
    assert extents(home) == []
    runtime.close()
    runtime = opened("home")
    assert runtime.agents() == []
    assert cached(turn(runtime, "ada", LONG)) == 0


def test_what_is_forgotten_cannot_be_read_from_copies(opened: Opened, tmp_path: Path) -> None:
    """The key lies in the keychain: whoever copied the whole home before has only ciphertext once it is dropped."""
    chain = MemoryKeyring()
    with installed(chain):
        runtime = opened("home", encrypt="keyring")
        talk(runtime)
        turn(runtime, "bob", LONG)
        assert runtime.agent("ada")["encrypted"] == "keyring"
        runtime.close()
        shutil.copytree(tmp_path / "home", tmp_path / "stolen")
        shutil.copytree(tmp_path / "home", tmp_path / "before")
        copy = opened("before")
        assert cached(turn(copy, "ada", "is it you?")) > 300
        copy.close()

        runtime = opened("home", encrypt="keyring")
        runtime.forget("ada")
        assert len(chain.entries) == 1
        copy = opened("stolen")
        assert [a["agent"] for a in copy.agents() if a["locked"]] == ["ada"]
        with pytest.raises(AgentLocked):
            turn(copy, "ada", "is it you?")
        assert cached(turn(copy, "bob", "and you?")) > 300
        assert holds(tmp_path / "stolen", MARKER) == []


def test_a_key_file_that_was_dropped_leaves_ciphertext(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home")
    talk(runtime)
    shutil.copytree(tmp_path / "home" / "store", tmp_path / "stolen" / "store")
    runtime.forget("ada")
    assert keys(tmp_path / "home") == []
    assert [a["locked"] for a in opened("stolen").agents()] == [True]


def test_forks_keep_the_key_they_share(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home")
    talk(runtime)
    runtime.fork("ada", "twin")
    runtime.forget("ada")
    assert len(keys(tmp_path / "home")) == 1
    assert cached(turn(runtime, "twin", "go on")) > 300
    runtime.close()
    runtime = opened("home")
    assert cached(turn(runtime, "twin", "and on")) > 300
    runtime.forget("twin")
    assert keys(tmp_path / "home") == []


def test_without_a_keychain_turns_are_refused_clearly(opened: Opened) -> None:
    import keyring.backends.fail

    with installed(keyring.backends.fail.Keyring()):  # type: ignore[no-untyped-call]
        runtime = opened("home", encrypt="keyring")
        with pytest.raises(StoreError, match="set encrypt to 'file'"):
            turn(runtime, "ada", "hello")
        assert runtime.agents() == []


def test_encrypted_agents_travel(opened: Opened, tmp_path: Path) -> None:
    here, there, plain = opened("here"), opened("there"), opened("plain", encrypt="off")
    talk(here)
    with here.transfer.export("ada") as file:
        (tmp_path / "ada").write_bytes(file.read())
    for runtime, kind in ((there, "file"), (plain, "off")):
        with (tmp_path / "ada").open("rb") as file:
            assert runtime.transfer.admit(file, trust=True)["kept"] == "state"
        assert runtime.agent("ada")["encrypted"] == kind
    one, two, three = (turn(r, "ada", "go on") for r in (here, there, plain))
    assert one.text == two.text == three.text
    assert cached(one) == cached(two) == cached(three) > 300
    assert holds(tmp_path / "there", MARKER) == []


@pytest.mark.slow
def test_merged_extents_are_sealed_too(opened: Opened, tmp_path: Path) -> None:
    runtime, plain = opened("home"), opened("plain", encrypt="off")
    for number in range(24):
        text = f"{number} {MARKER}"
        assert turn(runtime, "ada", text, max_tokens=2).text == turn(plain, "ada", text, max_tokens=2).text
    while runtime._call(lambda: runtime._memory.unwritten):
        time.sleep(0.005)
    assert runtime.store()["disk"]["compactions"] > 0
    runtime.close()
    assert holds(tmp_path / "home", MARKER) == []
    one, two = (turn(r, "ada", "last", max_tokens=2) for r in (opened("home"), plain))
    assert (one.text, cached(one)) == (two.text, cached(two))


def test_agents_that_do_not_persist_have_no_key(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home")
    turn(runtime, "ghost", TEXT, persist=False)
    assert runtime.agent("ghost")["encrypted"] == "off"
    runtime.create("shade", {"persist": False, "encrypt": "file"})
    turn(runtime, "shade", TEXT)
    assert keys(tmp_path / "home") == []
    assert holds(tmp_path / "home", MARKER) == []


def test_agents_choose_for_themselves(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home", encrypt="off")
    assert runtime.create("ada", {"encrypt": "file"})["encrypted"] == "file"
    runtime.close()
    runtime = opened("home", encrypt="off")
    assert runtime.agent("ada")["encrypted"] == "file"
    turn(runtime, "ada", TEXT)
    assert holds(tmp_path / "home", MARKER) == []
    before = keys(tmp_path / "home")
    assert len(before) == 1
    runtime.close()
    runtime = opened("home", encrypt="off")
    assert cached(turn(runtime, "ada", "go on")) > 300
    runtime.create("bob", {"encrypt": "file"})
    runtime.close()
    (set(keys(tmp_path / "home")) - set(before)).pop().unlink()
    runtime = opened("home", encrypt="off")
    assert [a["locked"] for a in runtime.agents()] == [False, True]
    with pytest.raises(AgentLocked):
        turn(runtime, "bob", "hello")
    runtime.set_policy("bob", {"pinned": True})
    assert runtime.health()["status"] == "ok"
    assert turn(runtime, "ada", "on").usage["agentmem"]["committed"]


def test_a_damaged_index_is_rebuilt_with_the_keys(opened: Opened, tmp_path: Path) -> None:
    runtime = opened("home")
    talk(runtime)
    turns = runtime.agent("ada")["turns"]
    runtime.close()
    index = tmp_path / "home" / "store" / "index.sqlite"
    content = bytearray(index.read_bytes())
    content[:100] = bytes(100)
    index.write_bytes(content)
    runtime = opened("home")
    assert runtime.agent("ada")["turns"] == turns
    assert cached(turn(runtime, "ada", "still there?")) > 300
    assert holds(tmp_path / "home", MARKER) == []

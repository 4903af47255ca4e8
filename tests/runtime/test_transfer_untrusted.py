"""Files that nobody exported: each way to be bad has its name, and nothing of a bad one stays."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from agentmem.blockpool.verify import verify
from agentmem.errors import BadArchive
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, cached, extents, open_runtime, turn
from tests.runtime.archives import Content, changed, content, seal

pytestmark = pytest.mark.slow

HUGE = 1 << 70


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent with two sessions."""
    folder = tmp_path_factory.mktemp("exported")
    runtime = open_runtime(folder / "home")
    turn(runtime, "ada", LONG)
    turn(runtime, "ada", "go on")
    turn(runtime, "ada", LONG[:100], session="side")
    path = folder / "ada.safetensors"
    with runtime.transfer.export("ada") as file:
        path.write_bytes(file.read())
    runtime.close()
    return path


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """The runtime that the files are tried on, with an agent of its own."""
    runtime = open_runtime(tmp_path_factory.mktemp("tried") / "home")
    turn(runtime, "eve", LONG)
    yield runtime
    runtime.close()


def admit(runtime: Runtime, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return runtime.transfer.admit(file, "guest")


def left_alone(runtime: Runtime) -> Any:
    """What an import that fails must not change (the time saved follows this machine's speed)."""
    home = runtime._settings.home
    runtime._call(runtime._pool.check)
    report = verify(home / "store", deep=False)
    assert report.ok, report
    assert report.orphans == []
    return (
        [{k: v for k, v in a.items() if k != "saved_ms"} for a in runtime.agents()],
        sorted(os.listdir(home / "store")),
        extents(home),
        runtime.health()["status"],
    )


def first_turn(c: Content) -> dict[str, Any]:
    return c.manifest["sessions"][0]["turns"][0]


def set_in(*path: Any, to: Any) -> Callable[[Content], None]:
    def change(c: Content) -> None:
        place = c.manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def text_of(c: Content, old: str, new: str) -> None:
    c.manifest = json.dumps(c.manifest).replace(old, new, 1)


def orphan(c: Content) -> None:
    c.manifest["sessions"] = c.manifest["sessions"][:1]
    c.log = c.log[: sum(t["ids"] for t in c.manifest["sessions"][0]["turns"])]


FLAWS: dict[str, tuple[str, Callable[[Content], Any]]] = {
    "no JSON": ("manifest", lambda c: setattr(c, "manifest", "{")),
    "a list": ("manifest", lambda c: setattr(c, "manifest", [])),
    "deep JSON": ("manifest", lambda c: setattr(c, "manifest", '{"pages":' + "[" * 100_000)),
    "an unknown field": ("manifest", set_in("more", to=1)),
    "a field less": ("manifest", lambda c: c.manifest.pop("text")),
    "a path as agent": ("manifest", set_in("agent", to="../../etc/passwd")),
    "a path as session": ("manifest", set_in("sessions", 0, "name", to="a/../b")),
    "two sessions of one name": ("manifest", set_in("sessions", 0, "name", to="side")),
    "a quota of nothing": ("manifest", set_in("policy", "quota_bytes", to=0)),
    "a reuse that there is not": ("manifest", set_in("policy", "reuse", to="always")),
    "a planner that there is not": ("manifest", set_in("policy", "planner", to="dense")),
    "a memory that there is not": ("manifest", set_in("policy", "memory", to={"kind": "some"})),
    "a memory of nothing": ("manifest", set_in("policy", "memory", to={"kind": "window", "recent": 0})),
    "a policy that no import has": ("manifest", set_in("policy", "encrypt", to="off")),
    "no sessions": ("manifest", set_in("sessions", to=[])),
    "no turns": ("manifest", set_in("sessions", 0, "turns", to=[])),
    "a bool as number": ("manifest", set_in("sessions", 0, "head", to=True)),
    "a huge number": ("manifest", set_in("sessions", 0, "turns", 0, "ids", to=HUGE)),
    "an endless number": ("manifest", lambda c: text_of(c, '"created": 1', '"created": 1e999, "x": 1')),
    "NaN": ("manifest", lambda c: text_of(c, '"restore_ms": 0.0', '"restore_ms": NaN')),
    "infinite": ("manifest", lambda c: text_of(c, '"restore_ms": 0.0', '"restore_ms": 1e999')),
    "nested stats": ("manifest", set_in("sessions", 0, "turns", 0, "stats", to={"a": {"b": 1}})),
    "a foreign role": ("manifest", set_in("sessions", 0, "turns", 0, "messages", 0, "role", to="root")),
    "content of another kind": (
        "manifest",
        set_in("sessions", 0, "turns", 0, "messages", 0, "content", to=[1]),
    ),
    "half a surrogate": (
        "manifest",
        set_in("sessions", 0, "turns", 0, "messages", 0, "content", to="\ud800"),
    ),
    "a foreign span": ("manifest", lambda c: first_turn(c)["spans"][0].__setitem__(0, "thought")),
    "an empty span": ("manifest", lambda c: first_turn(c)["spans"].append(["reply", 0, None])),
    "a fingerprint that is none": ("manifest", set_in("fingerprint", to="x")),
    "our state of another tokenizer": ("manifest", set_in("text", to="0" * 64)),
    "spans that are too short": ("log", lambda c: first_turn(c)["spans"].pop()),
    "spans that are too long": ("log", lambda c: first_turn(c)["spans"].append(["reply", 1, None])),
    "a log that is too short": ("log", lambda c: setattr(c, "log", c.log[:-1])),
    "a log that is too long": ("log", lambda c: setattr(c, "log", np.append(c.log, 1))),
    "ids beyond the vocabulary": ("log", lambda c: c.log.__setitem__(-1, 100_000)),
    "negative ids": ("log", lambda c: c.log.__setitem__(-1, -1)),
    "page tokens beyond the vocabulary": ("log", lambda c: c.tokens.__setitem__(0, 100_000)),
    "keeping tokens from nowhere": ("log", set_in("sessions", 0, "turns", 0, "keep_tokens", to=1)),
    "keeping messages from nowhere": ("log", set_in("sessions", 0, "turns", 1, "keep_messages", to=99)),
    "another page size": ("geometry", set_in("page_tokens", to=32)),
    "a page that is too long": ("pages", set_in("pages", 0, 2, to=65)),
    "an empty page": ("manifest", set_in("pages", 0, 2, to=0)),
    "a page as its own parent": ("pages", set_in("pages", 1, 0, to=1)),
    "a parent that comes later": ("pages", set_in("pages", 1, 0, to=2)),
    "a negative parent": ("manifest", set_in("pages", 1, 0, to=-1)),
    "a head that is no page": ("pages", set_in("sessions", 0, "head", to=10_000)),
    "a first page of the wrong kind": ("pages", set_in("pages", 0, 1, to=False)),
    "a page that is missing": ("pages", lambda c: c.manifest["pages"].pop()),
    "a page more": ("pages", lambda c: c.manifest["pages"].append([None, True, 5])),
    "pages of no session": ("pages", orphan),
    "pages of another text": ("pages", lambda c: c.tokens.__setitem__(70, (c.tokens[70] + 1) % 200)),
    "a head of another session": (
        "pages",
        lambda c: c.manifest["sessions"][1].update(head=c.manifest["sessions"][0]["head"]),
    ),
}


@pytest.mark.parametrize("name", FLAWS)
def test_each_way_to_be_bad_has_its_name(runtime: Runtime, exported: Path, tmp_path: Path, name: str) -> None:
    flaw, change = FLAWS[name]
    before = left_alone(runtime)
    with pytest.raises(BadArchive) as error:
        admit(runtime, changed(exported, tmp_path / "bad", change))
    assert error.value.code == f"archive_{flaw}", error.value.message
    assert len(error.value.message) < 300
    assert left_alone(runtime) == before


def test_rows_that_changed_on_the_way(runtime: Runtime, exported: Path, tmp_path: Path) -> None:
    data = bytearray(exported.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad").write_bytes(data)
    before = left_alone(runtime)
    with pytest.raises(BadArchive) as error:
        admit(runtime, tmp_path / "bad")
    assert error.value.code == "archive_checksum"
    assert left_alone(runtime) == before


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF, 0x7C007C00, 0x7E007E00])
def test_any_rows_are_only_the_guest_s_problem(
    runtime: Runtime, exported: Path, tmp_path: Path, word: int
) -> None:
    """Rows that no model computed (NaN, infinite) spoil the replies of the agent that came with them, and nothing else."""

    def spoil(c: Content) -> None:
        for layers in c.rows.values():
            for rows in layers:
                rows[:] = word

    expected = turn(runtime, "eve", "and you?", session=f"before {word}".replace(" ", "-")).text
    admit(runtime, changed(exported, tmp_path / "odd", spoil))
    guest = turn(runtime, "guest", "who are you?")
    assert cached(guest) > 300
    assert cached(turn(runtime, "mallory", LONG, session=f"s{word}")) > 0  # eve's state, not the guest's
    assert turn(runtime, "eve", "and you?", session=f"after-{word}").text == expected
    runtime.forget("guest")
    runtime._call(runtime._pool.check)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([63, 64, 65, 1 << 31, 1 << 63, HUGE, -HUGE]),
    st.floats(allow_nan=True),
    st.sampled_from(["", "default", "side", "prompt", "reply", "\0", "a" * 2000, "0" * 64, "../x", "\udc80"]),
    st.just([]),
    st.just({}),
    st.just([[0, False, 64]]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value."""
    if path:
        yield path
    steps: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, inner in steps:
        yield from places(inner, (*path, step))


def mutate(c: Content, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(list(places(c.manifest))))
        place = c.manifest
        for step in above:
            place = place[step]
        match data.draw(st.sampled_from(["set", "nudge", "drop", "double", "swap", "ids"])):
            case "set":
                place[last] = copy.deepcopy(data.draw(VALUES))  # a later step may change it
            case "nudge" if type(place[last]) is int:
                place[last] += data.draw(st.sampled_from([-1, 1]))
            case "drop":
                del place[last]
            case "double" if isinstance(place, list):
                place.insert(last, place[last])
            case "swap" if isinstance(place, list):
                other = data.draw(st.integers(0, len(place) - 1))
                place[last], place[other] = place[other], place[last]
            case "ids":
                array = data.draw(st.sampled_from([c.tokens, c.log]))
                array[data.draw(st.integers(0, len(array) - 1))] = data.draw(st.integers(-1, 300))


def try_out(runtime: Runtime, exported: Path, path: Path, data: st.DataObject) -> None:
    """A changed manifest is refused by name, or it makes an agent that speaks, exports and can be forgotten."""
    changed_content = content(exported)
    mutate(changed_content, data)
    seal(changed_content, path)
    before = left_alone(runtime)
    try:
        admit(runtime, path)
    except BadArchive as error:
        event(str(error.code))
        assert left_alone(runtime) == before
        return
    event("admitted")
    for session in runtime.agent("guest")["sessions"]:
        turn(runtime, "guest", "hello", session=session, max_tokens=2)
        json.dumps(runtime.explain("guest", session), allow_nan=False)
    runtime.transfer.export("guest").close()
    runtime.forget("guest")
    assert left_alone(runtime)[0] == before[0]
    runtime._call(runtime._pool.check)


fuzzed = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@settings(fuzzed, max_examples=40)
@given(data=st.data())
def test_no_manifest_is_worse_than_a_refusal(
    runtime: Runtime, exported: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    try_out(runtime, exported, tmp_path_factory.getbasetemp() / "mutated", data)


@pytest.mark.slow
@settings(fuzzed, max_examples=500)
@given(data=st.data())
def test_no_manifest_of_five_hundred_is(
    runtime: Runtime, exported: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    try_out(runtime, exported, tmp_path_factory.getbasetemp() / "mutated", data)

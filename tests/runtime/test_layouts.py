"""Agents on models whose layers carry state along: shared prompts, forks, choices, restarts, damage, and what is freed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from agentmem.errors import BadRequest
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.layouts import CARRIED, KINDS, LAYOUTS
from tests.runtime.agents import LONG, Running, ask, cached, extents, memory, quarantined, turn
from tests.runtime.test_jobs import finished, log, reached, request, transcript

MODELS: dict[str, LoadedModel] = {}


def model(kind: str) -> LoadedModel:
    """Evaluated, so that all runtimes may share it."""
    if kind not in MODELS:
        architecture, overrides = LAYOUTS[kind]
        MODELS[kind] = random_model(architecture, seed=5, **overrides)
        mx.eval(MODELS[kind].model.parameters())
    return MODELS[kind]


def opened(home: Path, kind: str, **options: Any) -> Runtime:
    settings = Settings(
        home=home,
        **{"ram_budget": 24 << 20, "itl_target_ms": 1e6, "page_tokens": 32, "chunk_tokens": 128, **options},
    )
    return Runtime.open(settings, lambda: model(kind))


def first(runtime: Runtime, agent: str, system: str, text: str, **options: Any) -> Any:
    """A whole prompt, as a client that keeps its conversation sends it."""
    request = ask(agent, text, history="client", **options)
    request.messages = [{"role": "system", "content": system}, *request.messages]
    return Running(runtime, request).end()


@pytest.mark.parametrize("kind", KINDS)
def test_agents_with_a_common_prompt_share_it(tmp_path: Path, kind: str) -> None:
    """The second shows where prompts part, the third goes on from there, and says what it says alone."""
    alone = opened(tmp_path / "alone", kind)
    want = first(alone, "c", LONG, "what of the sea?").text
    alone.close()
    runtime = opened(tmp_path / "home", kind)
    first(runtime, "a", LONG, "who?")
    first(runtime, "b", LONG, "when, and why?")
    third = first(runtime, "c", LONG, "what of the sea?")
    assert third.text == want
    assert cached(third) > 0.8 * third.usage["prompt_tokens"]
    runtime.close()


@pytest.mark.parametrize("kind", CARRIED)
def test_a_prompt_that_is_asked_again_is_not_read_again(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    one = first(runtime, "a", LONG, "who keeps the lamp?")
    two = first(runtime, "a", LONG, "who keeps the lamp?")
    assert two.text == one.text
    assert memory(two)["prefilled_tokens"] < 64
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_several_at_once_say_what_each_says_alone(tmp_path: Path, kind: str) -> None:
    texts = {"a": LONG, "b": "short", "c": LONG[100:400], "d": "and the tide comes in; " * 9}
    runtime = opened(tmp_path / "alone", kind)
    want = {
        name: [turn(runtime, name, t, max_tokens=24).text for t in (text, "go on")]
        for name, text in texts.items()
    }
    runtime.close()
    runtime = opened(tmp_path / "beside", kind)
    got: dict[str, list[str]] = {name: [] for name in texts}
    for part in (0, 1):
        running = {
            name: Running(runtime, ask(name, "go on" if part else text, max_tokens=24))
            for name, text in texts.items()
        }
        for name, one in running.items():
            got[name].append(one.end().text)
    assert got == want
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_choices_and_a_stop_sequence(tmp_path: Path, kind: str) -> None:
    """Choices go their own ways from one prompt; a reply that is cut at a stop sequence goes on as it was said."""
    runtime = opened(tmp_path / "a", kind)
    replies = {
        text: turn(runtime, text, text, max_tokens=30).text
        for text in ("lamp", "tell", "why", "night", "sea")
    }
    runtime.close()
    asked, whole = max(replies.items(), key=lambda item: len(item[1]))
    assert len(whole) > 10
    runtime = opened(tmp_path / "b", kind)
    three = turn(runtime, "b", asked, max_tokens=30, n=3)
    assert three.choices[0].text == whole
    runtime.close()
    stop = whole[6:9]
    runtime = opened(tmp_path / "c", kind)
    cut = turn(runtime, "c", asked, max_tokens=30, stop=(stop,))
    assert cut.text == whole[: whole.index(stop)]
    after = turn(runtime, "c", "and?")
    assert memory(after)["prefilled_tokens"] < 60
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_whoever_speaks_first(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    turn(runtime, "planner", LONG)
    before = runtime.store()["ram"]["used_bytes"]
    runtime.fork("planner", "coder")
    assert runtime.store()["ram"]["used_bytes"] == before
    one = turn(runtime, "planner", "go on")
    turn(runtime, "planner", "and on")
    two = turn(runtime, "coder", "go on")
    assert one.text == two.text
    assert memory(two)["prefilled_tokens"] <= memory(one)["prefilled_tokens"] < 60
    runtime.forget("planner")
    runtime.close()
    runtime = opened(tmp_path, kind)
    last = turn(runtime, "coder", "and then?")
    assert memory(last)["state_before"] == "warm"
    assert memory(last)["prefilled_tokens"] < 60
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_forgotten_means_freed(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    turn(runtime, "other", "stays")
    runtime._call(runtime._store.flush)
    before = runtime.store()
    for text in (LONG, "go on", LONG):
        turn(runtime, "gone", text)
    runtime.fork("gone", "child")
    runtime.forget("gone")
    runtime.forget("child")
    after = runtime.store()
    assert after["ram"]["used_bytes"] == before["ram"]["used_bytes"]
    assert after["disk"]["extent_bytes"] == before["disk"]["extent_bytes"]
    runtime.close()


@pytest.mark.parametrize("kind", CARRIED)
def test_old_checkpoints_leave_the_disk(tmp_path: Path, kind: str) -> None:
    """However many turns: the disk holds one checkpoint of the session."""
    runtime = opened(tmp_path, kind)
    sizes = []
    for _ in range(12):
        turn(runtime, "a", "on", max_tokens=1)
        sizes.append(runtime.store()["disk"]["extent_bytes"])
    runtime.close()
    rows = runtime.geometry.raw_row_bytes * 40
    assert sizes[-1] - sizes[5] < 8 * rows + runtime.geometry.carried_words * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_costs_time_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path / "a", kind, kv_format="fp16")
    turn(runtime, "a", LONG)
    runtime.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    runtime = opened(tmp_path / "a", kind, kv_format="fp16")
    want = turn(runtime, "a", "go on").text
    runtime.close()
    newest = max(extents(tmp_path / "b"), key=lambda p: int(p.stat().st_mtime_ns))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    runtime = opened(tmp_path / "b", kind, kv_format="fp16")
    again = turn(runtime, "a", "go on")
    assert again.text == want
    assert memory(again)["prefilled_tokens"] > 100
    assert quarantined(tmp_path / "b")
    assert memory(turn(runtime, "a", "and on"))["prefilled_tokens"] < 60
    runtime.close()


@pytest.mark.parametrize("kind", CARRIED)
def test_explain_tells_an_edit_from_a_lost_checkpoint(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    first(runtime, "a", "short", "who?")
    first(runtime, "a", "short", "when?")
    assert runtime.explain("a")["reason"] == "input_changed"
    turn(runtime, "a", "and on")
    assert runtime.explain("a")["reason"] == "extended"
    runtime._call(runtime._engine.checkpoints._known.clear)
    turn(runtime, "a", "and on")
    assert runtime.explain("a")["reason"] == "no_checkpoint"
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_is_sound_and_is_rebuilt_without_its_index(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    for text in (LONG, "go on"):
        turn(runtime, "a", text)
    report = runtime.upkeep.verify(deep=True, rebuild=True)
    assert not report["bad"]
    runtime.close()
    runtime = opened(tmp_path, kind)
    after = turn(runtime, "a", "and on")
    assert runtime.agent("a")["turns"] == 3
    assert cached(after) > 0
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layers_do_not_allow_is_refused(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, kind)
    with pytest.raises(BadRequest, match="kept whole"):
        runtime.create("a", {"memory": {"kind": "window", "recent": 512}})
    turn(runtime, "a", "hello")
    with pytest.raises(BadRequest, match="cannot be moved"):
        runtime.set_policy("a", {"reuse": "composed"})
    asked = turn(runtime, "a", "and?", reuse="composed")
    assert memory(asked)["composed_tokens"] == 0
    assert "not composed" in str(runtime.explain("a")["composition"])
    runtime.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_that_moves_says_the_same(tmp_path: Path, kind: str) -> None:
    """Where state is carried along, an archive holds the tokens; they are read once more."""
    runtime = opened(tmp_path / "here", kind, kv_format="fp16")
    turn(runtime, "a", LONG)
    with runtime.transfer.export("a") as file:
        want = turn(runtime, "a", "go on").text
        runtime.close()
        runtime = opened(tmp_path / "there", kind, kv_format="fp16")
        report = runtime.transfer.admit(file, trust=False)
    assert report["kept"] == ("state" if kind.startswith("latent") else "tokens")
    assert turn(runtime, "a", "go on").text == want
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_leaves_what_an_append_leaves(tmp_path: Path, kind: str) -> None:
    """A transcript that is read in the background, in parts, with a restart between them.

    Checkpoints before the ends of parts cut passes where one append has no cut, so a window's predictions are not the same bits.
    """

    def jobbed(name: str) -> Runtime:
        runtime = opened(tmp_path / name, kind)
        runtime._engine.planner._part = 128
        return runtime

    said = transcript(3, messages=12)
    plain = opened(tmp_path / "plain", kind)
    plain.append(request("ada", said))
    want, wanted = log(plain, "ada"), turn(plain, "ada", "and now?", max_tokens=12).text
    plain.close()
    runtime = jobbed("home")
    job = runtime.jobs.add(request("ada", said))
    reached(runtime, job, 128)
    runtime.close()
    runtime = jobbed("home")
    assert finished(runtime, job)["state"] == "done"
    assert log(runtime, "ada") == want
    assert turn(runtime, "ada", "and now?", max_tokens=12).text == wanted
    runtime.close()

"""Layer-streamed restores: the same answers, whatever is still read when the pass begins, and nothing of a damaged file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool import arena
from agentmem.engine import recall, stream
from agentmem.engine.stream import Stream
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.test_exact import check_trace
from tests.runtime.agents import LONG, Running, ask, cached, extents, memory, quarantined, turn

LAYERS = 6


class Streams(list[Stream]):
    """Every stream that was begun; `then` is called with the next."""

    then: Callable[[], None] | None = None


@pytest.fixture(params=["unified", "device"])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """All restores that can be streamed are, a layer at a time."""
    begun = Streams()

    class Noted(Stream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            begun.append(self)
            then, begun.then = begun.then, None
            if then is not None:
                then()

    monkeypatch.setattr(recall, "STREAM_BYTES", 1)
    monkeypatch.setattr(recall, "Stream", Noted)
    monkeypatch.setattr(stream, "GROUPS", LAYERS)
    if request.param == "device":
        monkeypatch.setattr(arena, "unified_memory", lambda: False)
    return begun


def opened(home: Path) -> Runtime:
    settings = Settings(home=home, ram_budget="16MiB", itl_target_ms=1e6)
    return Runtime.open(settings, lambda: random_model("llama", seed=0, num_hidden_layers=LAYERS))


@pytest.mark.slow
@pytest.mark.parametrize("trace", [0, 1])
def test_traces(tmp_path: Path, streams: Streams, trace: int) -> None:
    """Random conversations are those of the uninterrupted run, logits included, when every restore is streamed."""
    for i in range(2):
        rng = random.Random(4200 + 10 * trace + i)
        model = random_model("llama", seed=i, num_hidden_layers=LAYERS)
        check_trace(
            tmp_path / str(i), lambda m=model: m, rng, "streamed", longest=60, page_tokens=16, format="q4"
        )
    assert streams


def test_a_stream_is_reported_as_a_restore(tmp_path: Path, streams: Streams) -> None:
    runtime = opened(tmp_path)
    said = turn(runtime, "ada", LONG)
    held = said.usage["total_tokens"]
    runtime.evict("ada")
    again = turn(runtime, "ada", "go on")
    assert len(streams) == 1
    assert memory(again)["state_before"] == "warm"
    assert memory(again)["restored_tokens"] >= held - 1
    assert memory(again)["restore_ms"] > 0
    runtime._call(runtime._pool.check)
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_damage_that_is_found_on_the_way(tmp_path: Path, streams: Streams, where: float) -> None:
    """The pass is given up, the file put aside, its tokens read again, and the answer is the one it was."""
    runtime = opened(tmp_path / "sound")
    turn(runtime, "ada", LONG)
    want = turn(runtime, "ada", "go on").text
    runtime.close()
    home = tmp_path / "damaged"
    runtime = opened(home)
    turn(runtime, "ada", LONG)
    runtime.evict("ada")
    file = max(extents(home), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(where * (len(content) - start))] ^= 16
    file.write_bytes(content)
    again = turn(runtime, "ada", "go on")
    assert again.text == want
    assert cached(again) == 0
    assert quarantined(home) == [file.name]
    if where < 0.9:  # what lies behind the last full page is read before the stream begins
        assert streams[0].bad
    assert turn(runtime, "ada", "and then?").text
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    runtime.close()


@pytest.mark.slow
def test_others_that_share_the_pages_wait_until_all_layers_are_there(
    tmp_path: Path, streams: Streams
) -> None:
    runtime = opened(tmp_path)
    turn(runtime, "ada", LONG)
    names = ["bob", "cleo", "dora"]
    for name in names:
        runtime.fork("ada", name)
    want = turn(runtime, "ada", "go on").text
    runtime.close()
    runtime = opened(tmp_path)
    others: list[Running] = []
    streams.then = lambda: others.extend(Running(runtime, ask(name, "go on")) for name in names[1:])
    first = Running(runtime, ask(names[0], "go on"))
    assert first.end().text == want
    assert len(others) == 2
    assert [one.end().text for one in others] == [want] * 2
    assert len(streams) == 1
    runtime._call(runtime._pool.check)
    runtime.close()

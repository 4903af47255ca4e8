"""A home that meets another page size, format, tokenizer or chat template: words are kept, state of the other is never used,
and coming back finds it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem.model.loaded import LoadedModel
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.crash.home import MODEL, TURNS, Expected, start
from tests.runtime.agents import BUDGET, cached, memory, quarantined, turn


def changed(**identity: str) -> LoadedModel:
    """The same model under another identity, as after a new file of that kind."""
    return dataclasses.replace(MODEL, identity={**MODEL.identity, **identity})


def opened(home: Path, model: LoadedModel) -> Runtime:
    return Runtime.open(Settings(home=home, ram_budget=BUDGET), lambda: model)  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Path], Runtime]] = {
    "page size": lambda home: start(home, page_tokens=32),
    "format": lambda home: start(home, kv_format="q4-plain"),
    "weights": lambda home: opened(home, changed(weights="0" * 64)),
    "model": lambda home: opened(home, dataclasses.replace(changed(weights="1" * 64), name="another")),
    "tokenizer": lambda home: opened(home, changed(tokenizer="0" * 64)),
    "chat template": lambda home: opened(home, changed(chat_template="0" * 64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_words_outlive_a_change_and_state_waits_for_the_way_back(
    home: Path, expected: Expected, change: Callable[[Path], Runtime]
) -> None:
    other = change(home)
    said = {a["agent"]: a["turns"] for a in other.agents()}
    assert said == {agent: len(texts) for agent, texts in TURNS.items()}
    assert {a["state"] for a in other.agents()} == {"cold"}
    reply = turn(other, "bob", "go on")
    assert cached(reply) == 0
    assert memory(reply)["state_before"] == "cold"
    assert memory(reply)["prefilled_tokens"] == reply.usage["prompt_tokens"]
    assert reply.usage["prompt_tokens"] == expected.prompts["bob"]
    renamed = other.model_name == "another"
    assert other.explain("bob")["reason"] == ("model_changed" if renamed else "fingerprint_changed")
    turn(other, "bob", "and?")
    assert other.explain("bob")["reason"] == "extended"
    assert other.upkeep.verify(deep=True)["ok"]
    other.close()
    back = start(home)
    for agent in ("ada", "cleo"):
        reply = turn(back, agent, "go on", max_tokens=4)
        assert (reply.text, cached(reply)) == (expected.replies[agent], expected.cached[agent])
    assert turn(back, "bob", "and now?").usage["prompt_tokens"] > expected.prompts["bob"]
    back.close()
    assert quarantined(home) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_damaged_index_keeps_the_state_of_both(
    home: Path, expected: Expected, change: Callable[[Path], Runtime]
) -> None:
    other = change(home)
    turn(other, "bob", "go on")
    words = turn(other, "bob", "and then?").text
    other.close()
    (home / "store" / "index.sqlite").open("r+b").write(b"damaged")
    other = change(home)
    assert other.agent("bob")["turns"] == len(TURNS["bob"]) + 2
    after = turn(other, "bob", "why?")
    assert cached(after) > expected.prompts["bob"]
    assert words
    other.close()
    back = start(home)
    for agent in ("ada", "cleo"):
        reply = turn(back, agent, "go on", max_tokens=4)
        assert (reply.text, cached(reply)) == (expected.replies[agent], expected.cached[agent])
    back.close()
    assert [n for n in quarantined(home) if n.endswith(".safetensors")] == []

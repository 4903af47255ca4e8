"""Names of frameworks become names of the daemon, and two of them never the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.adapters.naming import cache_key, legal_name, thread_session
from agentmem.api.chat_body import ChatBody
from agentmem.api.identity import resolve
from agentmem.engine.request import NAME, check_name

NAMES = st.text(min_size=1, max_size=200) | st.from_regex(r"[A-Za-z./_ -]{1,140}", fullmatch=True)


@given(NAMES)
def test_every_name_becomes_a_legal_one(text: str) -> None:
    assert check_name(legal_name(text)) == legal_name(text)


@given(st.from_regex(NAME, fullmatch=True).filter(lambda name: ".." not in name))
def test_a_legal_name_stays(name: str) -> None:
    assert legal_name(name) == name


@given(NAMES, NAMES)
def test_two_names_stay_two(one: str, other: str) -> None:
    assert (legal_name(one) == legal_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plan ner", "plan-ner"),
        ("a/b", "a-b"),
        ("a..b", "a.b"),
        ("é", "è"),
        ("x" * 129, "x" * 130),
        ("", " "),
    ],
)
def test_names_that_look_alike_stay_two(one: str, other: str) -> None:
    assert legal_name(one) != legal_name(other)


def test_what_is_readable_stays_readable() -> None:
    assert legal_name("Plan ner!").startswith("Plan-ner-")


@given(NAMES, NAMES)
def test_the_daemon_reads_a_key_as_it_was_meant(agent: str, thread: str) -> None:
    session = thread_session(thread)
    key = cache_key(agent, session)
    body = ChatBody.model_validate(
        {"messages": [{"role": "user", "content": "hello"}], "prompt_cache_key": key}
    )
    who = resolve({}, body)
    assert (who.agent, who.session, who.source) == (legal_name(agent), session, "prompt_cache_key")


def test_no_thread_is_the_session_of_clients_that_name_none() -> None:
    assert thread_session("default") != "default"
    assert thread_session("t-42") == "t-42"
    assert thread_session(42) == "42"


def test_a_session_alone_is_an_agent_and_nobody_is_nobody() -> None:
    assert cache_key(None, "t-42") == "t-42"
    assert cache_key("plan ner", None) == legal_name("plan ner")
    assert cache_key(None, None) is None


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["langchain", "pydantic_ai"])
def test_adapters_run_without_mlx(adapter: str) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('mlx', 'mlx_lm'):\n"
        "            raise ImportError('no ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"import agentmem.adapters.{adapter}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

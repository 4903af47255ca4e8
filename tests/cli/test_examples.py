"""Every example runs against a daemon and prints what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(params=["daemon_home", pytest.param("embedded_home", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with a daemon, made the default home: on the tiny model, and on one that knows words."""
    home: Home = request.getfixturevalue(request.param)
    monkeypatch.setenv("AGENTMEM_HOME", str(home.root))
    return home


def run(name: str, python: str = sys.executable) -> str:
    command = ["sh"] if name.endswith(".sh") else [python]
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    url = parse(invoke("status", "--json"))["url"]
    result = subprocess.run(
        [*command, str(EXAMPLES / name)],
        env={**os.environ, "PATH": scripts, "AGENTMEM_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.iterdir():
        if example.is_file():
            assert f'run("{example.name}"' in source, f"{example.name} has no test"


def test_openai_client_remembers_its_first_run(daemon: Home) -> None:
    pattern = re.compile(r"\((\d+) of (\d+) prompt tokens were remembered\)")
    first = pattern.search(run("openai_client.py"))
    second = pattern.search(run("openai_client.py"))
    assert first is not None
    assert second is not None
    assert int(first[1]) < int(second[1])
    # The same prompt again: all of it but the one token whose logits start the reply.
    assert int(second[1]) == int(second[2]) - 1
    assert parse(invoke("show", "geographer", "--json"))["agent"]["turns"] == 2


def test_two_agents_have_two_memories(daemon: Home) -> None:
    printed = run("two_agents.py")
    assert len(re.findall(r"^  [1-9]\d* tokens remembered", printed, re.MULTILINE)) == 2
    names = {agent["agent"] for agent in parse(invoke("agents", "--json"))["agents"]}
    assert {"gardener", "cook"} <= names


def remembered(printed: str) -> list[tuple[int, int]]:
    """What a program says of each of its turns: tokens that were remembered, and those of the prompt."""
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+) of (\d+) prompt tokens were remembered", printed)]


@pytest.mark.slow
def test_langgraph_agents_remember_each_its_own_and_so_does_a_copied_thread(daemon: Home) -> None:
    first = remembered(run("langgraph_two_agents.py"))
    second = remembered(run("langgraph_two_agents.py"))
    assert len(first) == len(second) == 6
    assert all(cached > before for (cached, _), (before, _) in zip(second[:2], first[:2], strict=True))
    assert all(cached > 0 for cached, _ in first[2:])
    agents = {agent["agent"]: agent for agent in parse(invoke("agents", "--json"))["agents"]}
    for name in ("planner", "critic"):
        assert {"garden", "garden-with-pond"} <= set(agents[name]["sessions"])
        assert agents[f"{name}@garden-with-pond"]["lineage"]["parent"] == name


@pytest.mark.slow
def test_pydantic_ai_agents_remember_each_its_own(daemon: Home) -> None:
    first = remembered(run("pydantic_ai_two_agents.py"))
    second = remembered(run("pydantic_ai_two_agents.py"))
    assert len(first) == len(second) == 4
    assert all(cached > before for (cached, _), (before, _) in zip(second[:2], first[:2], strict=True))
    agents = {agent["agent"]: agent for agent in parse(invoke("agents", "--json"))["agents"]}
    assert all("story" in agents[name]["sessions"] for name in ("author", "editor"))


@pytest.mark.slow
def test_openai_agents_hand_over_and_remember(daemon: Home) -> None:
    run("openai_agents_handoff.py")
    first, *later = remembered(run("openai_agents_handoff.py"))
    assert first[0] == first[1] - 1
    assert len(later) == 2
    assert all(cached > 0 for cached, _ in later)
    assert "garden" in parse(invoke("show", "critic", "--json"))["agent"]["sessions"]


@pytest.mark.slow
def test_agents_of_the_agent_framework_remember(daemon: Home) -> None:
    run("agent_framework_two_agents.py")
    first, *later = remembered(run("agent_framework_two_agents.py"))
    assert first[0] == first[1] - 1
    assert len(later) == 2
    assert all(cached > 0 for cached, _ in later)
    assert "garden" in parse(invoke("show", "critic", "--json"))["agent"]["sessions"]


@pytest.mark.slow
def test_autogen_needs_no_adapter(daemon: Home) -> None:
    turns = remembered(run("autogen_recipe.py"))
    assert len(turns) == 2
    assert all(cached > 0 for cached, _ in turns)


@pytest.mark.slow
def test_smolagents_need_no_adapter(daemon: Home) -> None:
    run("smolagents_recipe.py")
    turns = remembered(run("smolagents_recipe.py"))
    assert len(turns) == 2
    assert turns[0][0] == turns[0][1] - 1
    assert "garden" in parse(invoke("show", "critic", "--json"))["agent"]["sessions"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_curl_prints_a_reply_and_its_agent(daemon: Home) -> None:
    reply, agent = run("curl.sh").strip().splitlines()
    assert json.loads(reply)["choices"][0]["message"]["role"] == "assistant"
    assert json.loads(agent)["agent"] == "traveller"


def apart(folder: Path, *packages: str) -> str:
    """The Python of an environment that holds nothing but these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=1200)
    return python


nightly = pytest.mark.skipif(
    not os.environ.get("AGENTMEM_NIGHTLY"), reason="installs an environment of its own; set AGENTMEM_NIGHTLY"
)


def with_token(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_TOKEN", home.token.read_text().strip())


@nightly
@pytest.mark.slow
def test_llamaindex_needs_no_adapter(daemon: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_token(daemon, monkeypatch)
    python = apart(tmp_path / "env", "llama-index-llms-openai-like")
    run("llamaindex_recipe.py", python=python)
    turns = remembered(run("llamaindex_recipe.py", python=python))
    assert len(turns) == 2
    assert turns[0][0] == turns[0][1] - 1
    assert "garden" in parse(invoke("show", "critic", "--json"))["agent"]["sessions"]


@nightly
@pytest.mark.slow
def test_crewai_needs_no_adapter(daemon: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_token(daemon, monkeypatch)
    run("crewai_recipe.py", python=apart(tmp_path / "env", "crewai"))
    agents = {agent["agent"]: agent for agent in parse(invoke("agents", "--json"))["agents"]}
    assert "garden" in agents["planner"]["sessions"]
    assert "garden" in agents["critic"]["sessions"]

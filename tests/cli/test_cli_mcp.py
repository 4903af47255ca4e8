"""`agentmem mcp`, asked by the protocol's own client over stdio."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agentmem.client import AgentMemClient
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

pytestmark = pytest.mark.slow

ALL_BUT_FORGET = {
    "list_agents", "show_agent", "explain", "list_documents", "fork", "warm", "evict", "pin", "unpin", "append",
    "register_document", "unregister_document",
}  # fmt: skip
RUN = "from agentmem.cli.main import main; main()"


def talk(home: Home, work: Callable[[Any], Coroutine[Any, Any, Any]], *flags: str) -> Any:
    """Run `work` with a client of a fresh `agentmem mcp`."""
    from mcp import Client, StdioServerParameters

    environment = {**os.environ, "AGENTMEM_HOME": str(home.root)}
    server = StdioServerParameters(command=sys.executable, args=["-c", RUN, "mcp", *flags], env=environment)

    async def run() -> Any:
        async with Client(server) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(run(), 120))


def value(result: Any) -> Any:
    assert not result.is_error, result.content
    structured = result.structured_content
    return structured["result"] if set(structured) == {"result"} else structured


def test_every_verb_reaches_the_daemon(daemon: Home) -> None:
    async def work(client: Any) -> None:
        async def call(tool: str, **arguments: Any) -> Any:
            return value(await client.call_tool(tool, arguments))

        assert {tool.name for tool in (await client.list_tools()).tools} == ALL_BUT_FORGET
        usage = await call("append", agent="clerk", text="The key is under the third stone.")
        assert usage["agentmem"]["prefilled_tokens"] > 0
        assert (await call("show_agent", agent="clerk"))["turns"] == 1
        assert (await call("evict", agent="clerk"))["state"] == "warm"
        assert (await call("warm", agent="clerk"))["state"] == "hot"
        assert (await call("pin", agent="clerk"))["pinned"] is True
        assert (await call("unpin", agent="clerk"))["pinned"] is False
        forked = await call("fork", agent="clerk", new="deputy", at=1)
        assert forked["lineage"]["parent"] == "clerk"
        assert (await call("explain", agent="clerk"))["agent"] == "clerk"
        assert {"clerk", "deputy"} <= {agent["agent"] for agent in await call("list_agents")}
        assert (await call("register_document", name="rules", text="No dogs."))["name"] == "rules"
        assert "rules" in {document["name"] for document in await call("list_documents")}
        await call("unregister_document", name="rules")
        assert "rules" not in {document["name"] for document in await call("list_documents")}

    talk(daemon, work)


def test_what_goes_wrong_is_told(daemon: Home) -> None:
    async def work(client: Any) -> tuple[Any, Any, Any]:
        return (
            await client.call_tool("show_agent", {"agent": "nobody"}),
            await client.call_tool("warm", {"agent": "../token"}),
            await client.call_tool("forget", {"agent": "nobody"}),
        )

    unknown, illegal, unoffered = talk(daemon, work)
    assert unknown.is_error
    assert "nobody" in unknown.content[0].text
    assert illegal.is_error
    assert unoffered.is_error


def test_forget_is_offered_when_it_is_allowed(daemon: Home) -> None:
    async def work(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {*ALL_BUT_FORGET, "forget"}
        assert tools["forget"].annotations.destructive_hint is True
        assert tools["list_agents"].annotations.read_only_hint is True
        assert value(await client.call_tool("forget", {"agent": "leaver"}))["deleted"] is True

    with AgentMemClient(home=daemon.root, namespace="elsewhere") as client:
        client.append("leaver", "Goodbye.")
        talk(daemon, work, "--allow-forget", "--namespace", "elsewhere")
        assert client.agents() == []


def test_without_a_daemon_each_call_says_so(home: Home) -> None:
    async def work(client: Any) -> Any:
        return await client.call_tool("list_agents", {})

    result = talk(home, work)
    assert result.is_error
    assert "agentmem up" in result.content[0].text


def test_json_lists_the_tools(home: Home) -> None:
    assert {tool["name"] for tool in parse(invoke("mcp", "--json"))["tools"]} == ALL_BUT_FORGET
    assert not home.root.exists()


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, "mcp", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "agentmem-mlx[mcp]" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr

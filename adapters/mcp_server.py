"""The daemon's control verbs as tools of the Model Context Protocol: an agent looks after memories, its own and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

import agentmem
from agentmem.client import AgentMemClient
from agentmem.errors import AgentMemError

INSTRUCTIONS = (
    "agentmem keeps the attention state of agents, so that nothing they have read is read again. "
    "hot: in RAM; warm: on disk; cold: only the tokens are kept, the state is computed again."
)

Agent = Annotated[str, Field(description="Name of the agent.")]
Session = Annotated[
    str | None, Field(description="One of its conversations. Default: the one that the daemon would take.")
]
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
WRITES = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
DESTROYS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)


class Verbs:
    """The tools. Each call finds the daemon anew, so that it may start after this server, or start again."""

    def __init__(self, home: str | Path | None = None, namespace: str = "default") -> None:
        self._home = home
        self._namespace = namespace

    def list_agents(self) -> list[dict[str, Any]]:
        """Every agent: its context in tokens, its state (hot, warm or cold), bytes, and what of its prompts was remembered."""
        with self._daemon() as client:
            return client.agents()

    def show_agent(self, agent: Agent) -> dict[str, Any]:
        """Everything about one agent."""
        with self._daemon() as client:
            return client.agent(agent)

    def explain(self, agent: Agent, session: Session = None) -> dict[str, Any]:
        """Why an agent's last turn was, or was not, taken from memory, and what that cost."""
        with self._daemon() as client:
            return client.explain(agent, session)

    def list_documents(self) -> list[dict[str, Any]]:
        """The texts that are looked for in prompts, with their tokens."""
        with self._daemon() as client:
            return client.documents()

    def fork(
        self,
        agent: Agent,
        new: Annotated[str, Field(description="Name of the new agent.")],
        session: Session = None,
        at: Annotated[
            int | None, Field(ge=1, description="Go on from after this turn. Default: the last.")
        ] = None,
    ) -> dict[str, Any]:
        """Make a new agent that goes on from another. Nothing is copied; each goes its own way from there."""
        with self._daemon() as client:
            return client.fork(agent, new, session=session, at=at)

    def warm(self, agent: Agent) -> dict[str, Any]:
        """Bring an agent's state from disk into RAM, ahead of its next turn."""
        with self._daemon() as client:
            return client.warm(agent)

    def evict(self, agent: Agent) -> dict[str, Any]:
        """Take an agent's state out of RAM. It stays on disk; nothing is lost."""
        with self._daemon() as client:
            return client.evict(agent)

    def pin(self, agent: Agent) -> dict[str, Any]:
        """Keep an agent's state when room is needed."""
        with self._daemon() as client:
            return client.set_policy(agent, pinned=True)

    def unpin(self, agent: Agent) -> dict[str, Any]:
        """Let an agent's state go when room is needed."""
        with self._daemon() as client:
            return client.set_policy(agent, pinned=False)

    def append(
        self,
        agent: Agent,
        text: Annotated[str, Field(description="What the agent reads.")],
        session: Session = None,
        role: Annotated[Literal["user", "system"], Field(description="Whose message it becomes.")] = "user",
    ) -> dict[str, Any]:
        """Add a text to what an agent remembers, without a reply. Returns the usage."""
        with self._daemon() as client:
            return client.append(agent, text, session=session, role=role)

    def register_document(
        self, name: Annotated[str, Field(description="Name of the document.")], text: str
    ) -> dict[str, Any]:
        """Look for a text in prompts, under a name."""
        with self._daemon() as client:
            return client.register_document(name, text)

    def unregister_document(
        self, name: Annotated[str, Field(description="Name of the document.")]
    ) -> dict[str, Any]:
        """Look for a document no more."""
        with self._daemon() as client:
            return client.unregister_document(name)

    def forget(self, agent: Agent) -> dict[str, Any]:
        """Delete everything an agent remembers. This cannot be undone."""
        with self._daemon() as client:
            return client.forget(agent)

    @contextmanager
    def _daemon(self) -> Iterator[AgentMemClient]:
        try:
            with AgentMemClient(home=self._home, namespace=self._namespace) as client:
                yield client
        except AgentMemError as error:
            raise ToolError(error.message) from error


def mcp_server(
    home: str | Path | None = None, namespace: str = "default", *, allow_forget: bool = False
) -> MCPServer:
    """A server of the verbs, for the daemon of `home`. It has `forget` only with `allow_forget`."""
    server = MCPServer(
        "agentmem", instructions=INSTRUCTIONS, version=agentmem.__version__, log_level="WARNING"
    )
    verbs = Verbs(home, namespace)
    reads: list[Callable[..., Any]] = [
        verbs.list_agents, verbs.show_agent, verbs.explain, verbs.list_documents,
    ]  # fmt: skip
    writes: list[Callable[..., Any]] = [
        verbs.fork, verbs.warm, verbs.evict, verbs.pin, verbs.unpin, verbs.append, verbs.register_document,
        verbs.unregister_document,
    ]  # fmt: skip
    for tool in reads:
        server.add_tool(tool, annotations=READS)
    for tool in writes:
        server.add_tool(tool, annotations=WRITES)
    if allow_forget:
        server.add_tool(verbs.forget, annotations=DESTROYS)
    return server

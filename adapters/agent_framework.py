"""Microsoft Agent Framework: `AgentMemContextProvider`, `AgentMemChatMiddleware`, and `chat_client` on the daemon.

The agent is named by its name, the session by the session's id. An agent without a name (its id may be another in every
process) is one for each session; a run without a session gets one of its own from the framework.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent_framework import (
    AgentSession,
    ChatContext,
    ChatMiddleware,
    ContextProvider,
    SessionContext,
    SupportsAgentRun,
)
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient

from agentmem.adapters.connection import openai_client
from agentmem.adapters.naming import cache_key, thread_session
from agentmem.adapters.threads import Threads
from agentmem.adapters.warmer import Warmer

KEY = "prompt_cache_key"


def chat_client(
    model: str = "default",
    *,
    url: str | None = None,
    token: str | None = None,
    home: str | Path | None = None,
    **options: Any,
) -> OpenAIChatCompletionClient:
    """A chat-completions client on the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning.

    `options` are those of OpenAIChatCompletionClient.
    """
    return OpenAIChatCompletionClient(model, async_client=openai_client(url, token, home), **options)


def responses_client(
    model: str = "default",
    *,
    url: str | None = None,
    token: str | None = None,
    home: str | Path | None = None,
    **options: Any,
) -> OpenAIChatClient:
    """The same for the Responses API; `options` are those of OpenAIChatClient."""
    return OpenAIChatClient(model, async_client=openai_client(url, token, home), **options)


class AgentMemChatMiddleware(ChatMiddleware):
    """Names `agent`, and the session of the run, to the daemon. A key that somebody set stays.

    For a chat-completions or a Responses client; one object for each agent. AgentMemContextProvider brings it along.
    """

    def __init__(self, agent: str | None = None) -> None:
        self.agent = agent

    async def process(self, context: ChatContext, call_next: Callable[[], Awaitable[None]]) -> None:
        options = dict(context.options or {})
        session = thread_session(context.session.session_id) if context.session is not None else None
        key = cache_key(self.agent, session)
        if key is not None and options.get(KEY) is None:
            context.options = {**options, KEY: key}
        await call_next()


class AgentMemContextProvider(ContextProvider):
    """Warms the agent's memory while a run is made ready, and names the agent and its session to the daemon.

    `Agent(client, name="planner", context_providers=[AgentMemContextProvider()])`; one object serves many agents.
    """

    def __init__(
        self,
        source_id: str = "agentmem",
        *,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
    ) -> None:
        super().__init__(source_id)
        self._threads = Threads(url, token, home)
        self._warmer = Warmer(self._threads)

    async def before_run(
        self,
        *,
        agent: SupportsAgentRun,
        session: AgentSession,
        context: SessionContext,
        state: dict[str, Any],
    ) -> None:
        self._warmer.start(agent.name)
        context.extend_middleware(self.source_id, AgentMemChatMiddleware(agent.name))

    async def forget(self, session: AgentSession) -> list[str]:
        """Forget the agents that speak in no other session; returns their names. Raises DaemonNotRunning.

        Of an agent of several sessions, only what it said in this one goes.
        """
        return await self._threads.aforget(session.session_id)

"""pydantic-ai: `AgentMemory`, a capability of agents, and `model`, a chat model on the daemon."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from pydantic_ai import ModelSettings, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationStore
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

from agentmem.adapters.naming import cache_key, thread_session
from agentmem.adapters.threads import Threads
from agentmem.daemon import find_endpoint
from agentmem.wire import CONNECT_TIMEOUT_S, READ_TIMEOUT_S


def model(
    name: str = "default",
    *,
    url: str | None = None,
    token: str | None = None,
    home: str | Path | None = None,
    settings: ModelSettings | None = None,
) -> OpenAIChatModel:
    """A chat model on the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning."""
    endpoint = find_endpoint(url, token, home)
    http: Any = httpx.AsyncClient(
        # A proxy that the environment names must never see the token.
        trust_env=False,
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # No connection is kept: it would belong to one event loop, and `run_sync` may bring another.
        limits=httpx.Limits(max_keepalive_connections=0),
    )
    client = AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.token or "none", http_client=http)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client), settings=settings)


@dataclass
class AgentMemory(AbstractCapability[Any]):
    """Names the agent and its conversation to the daemon, and warms its memory before a run begins.

    `agent` goes before the agent's own name. The daemon to warm is the one at `url`, by default the one that holds `home`.
    """

    agent: str | None = None
    _: KW_ONLY
    url: str | None = None
    token: str | None = field(default=None, repr=False)
    home: str | Path | None = None

    def __post_init__(self) -> None:
        self._threads = Threads(self.url, self.token, self.home)

    def get_model_settings(self) -> Any:
        return self._settings

    async def before_run(self, ctx: RunContext[Any]) -> None:
        """Warm the agent's memory while the rest is made ready."""
        await self._threads.awarm(self._name(ctx))

    async def fork(self, store: ConversationStore, conversation_id: str, **options: Any) -> Conversation:
        """`store.fork(conversation_id, **options)`; the memory of each agent of the conversation is forked with it."""
        forked = await store.fork(conversation_id, **options)
        await self._threads.afork(conversation_id, forked.conversation_id)
        return forked

    async def forget(self, store: ConversationStore, conversation_id: str, **options: Any) -> None:
        """`store.delete(conversation_id, **options)`, and the agents that speak in no other conversation are forgotten.

        Raises DaemonNotRunning before anything is deleted. A conversation that is not in the store is left as it is.
        """
        if await store.load(conversation_id, limit=0, **options) is None:
            return
        await self._threads.aforget(conversation_id)
        await store.delete(conversation_id, **options)

    def _settings(self, ctx: RunContext[Any]) -> ModelSettings:
        if (ctx.model_settings or {}).get("openai_prompt_cache_key"):
            return ModelSettings()
        session = thread_session(ctx.conversation_id) if ctx.conversation_id else None
        key = cache_key(self._name(ctx), session)
        return OpenAIChatModelSettings(openai_prompt_cache_key=key) if key else ModelSettings()

    def _name(self, ctx: RunContext[Any]) -> str | None:
        return self.agent or (ctx.agent.name if ctx.agent is not None else None)

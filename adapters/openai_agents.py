"""OpenAI Agents SDK: `AgentMemProvider`, `AgentMemRunHooks`, `AgentMemSession`.

The agent is named as the one that runs, the session by the id of the run's conversation, session or group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from agents import (
    Agent,
    AgentOutputSchemaBase,
    Handoff,
    Model,
    ModelProvider,
    ModelResponse,
    ModelSettings,
    ModelTracing,
    OpenAIChatCompletionsModel,
    RunContextWrapper,
    RunHooks,
    SessionSettings,
    SQLiteSession,
    Tool,
    TResponseInputItem,
    get_current_span,
    get_current_trace,
)
from agents.items import TResponseStreamEvent
from agents.memory import Session
from openai.types.responses.response_prompt_param import ResponsePromptParam

from agentmem.adapters.connection import openai_client
from agentmem.adapters.naming import cache_key, legal_name, thread_session
from agentmem.adapters.threads import Threads
from agentmem.adapters.warmer import Warmer

__all__ = ["AgentMemModel", "AgentMemProvider", "AgentMemRunHooks", "AgentMemSession"]

KEY = "prompt_cache_key"
MADE_BY_SDK = "agents-sdk:"


class AgentMemProvider(ModelProvider):
    """Models on the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning.

    `RunConfig(model_provider=AgentMemProvider())`: every call then says who speaks, and streams tell what was remembered.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, home: str | Path | None = None
    ) -> None:
        self._client = openai_client(url, token, home)

    def get_model(self, model_name: str | None) -> Model:
        return AgentMemModel(model_name or "default", self._client)

    async def aclose(self) -> None:
        await self._client.close()


class AgentMemModel(OpenAIChatCompletionsModel):
    """A chat-completions model that names the running agent and its session. A key that somebody set stays."""

    def _supports_default_prompt_cache_key(self) -> bool:
        # Asks the SDK for its own key, which it keeps from servers other than OpenAI's. No public hook tells a model
        # about the session; without this one, sessions would be told apart by conversation and group ids only.
        return True

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> ModelResponse:
        return await super().get_response(
            system_instructions,
            input,
            named(model_settings, conversation_id),
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id,
            conversation_id,
            prompt,
        )

    def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        settings = named(model_settings, conversation_id)
        if settings.include_usage is None:
            settings = replace(settings, include_usage=True)
        return super().stream_response(
            system_instructions,
            input,
            settings,
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id,
            conversation_id,
            prompt,
        )


class AgentMemRunHooks(RunHooks[Any]):
    """Warms the memory of the agent that a handoff goes to, while the SDK makes its turn ready."""

    def __init__(
        self, url: str | None = None, token: str | None = None, home: str | Path | None = None
    ) -> None:
        self._warmer = Warmer(Threads(url, token, home))

    async def on_handoff(
        self, context: RunContextWrapper[Any], from_agent: Agent[Any], to_agent: Agent[Any]
    ) -> None:
        self.warm(to_agent)

    def warm(self, agent: Agent[Any]) -> None:
        """Begin to warm an agent, for programs that hand over themselves."""
        self._warmer.start(agent.name)


class AgentMemSession:
    """A session whose end is also that of the daemon's memory. `session` keeps the items; an id alone: SQLiteSession, in RAM."""

    def __init__(
        self,
        session: str | Session,
        *,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
    ) -> None:
        self._items: Session = SQLiteSession(session) if isinstance(session, str) else session
        self.session_id = self._items.session_id
        self._threads = Threads(url, token, home)
        _SESSIONS[digest(self.session_id)] = self

    @property
    def session_settings(self) -> SessionSettings | None:
        return self._items.session_settings

    @session_settings.setter
    def session_settings(self, settings: SessionSettings | None) -> None:
        self._items.session_settings = settings

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        return await self._items.get_items(limit)

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        await self._items.add_items(items)

    async def pop_item(self) -> TResponseInputItem | None:
        return await self._items.pop_item()

    async def clear_session(self) -> None:
        """Clear the items, and forget the agents that speak in no other session. Raises DaemonNotRunning, items cleared.

        Of an agent of several sessions, only what it said in this one goes.
        """
        await self._items.clear_session()
        await self._threads.aforget(self.session_id.strip())


_SESSIONS: WeakValueDictionary[str, AgentMemSession] = WeakValueDictionary()
"""By the digest that the SDK makes of a session's id. It holds none of them: those that run are held by the SDK."""


def digest(grouping: str) -> str:
    """What the SDK's key tells of an id."""
    return sha256(grouping.strip().encode()).hexdigest()[:32]


def named(settings: ModelSettings, conversation_id: str | None) -> ModelSettings:
    """`settings` of one call with the key of who speaks, unless somebody set another."""
    extra = dict(settings.extra_args or {})
    made = extra.get(KEY)
    ours = isinstance(made, str) and made.startswith(MADE_BY_SDK)
    body = settings.extra_body
    if (made is not None and not ours) or (isinstance(body, Mapping) and KEY in body):
        return settings
    key = cache_key(speaker(), session_of(made if ours else None, conversation_id))
    if key is None:
        extra.pop(KEY, None)
    else:
        extra[KEY] = key
    return replace(settings, extra_args=extra)


def speaker() -> str | None:
    """The running agent. The SDK runs hooks in tasks of their own, whose context variables no model sees; spans it does."""
    span = get_current_span()
    data = span.span_data if span is not None else None
    found = getattr(data, "agent_name", None) or (
        getattr(data, "name", None) if getattr(data, "type", None) == "agent" else None
    )
    return found or None


def session_of(made: str | None, conversation_id: str | None) -> str | None:
    """The daemon's session of a run: by the id of its conversation, session or group, else by the SDK's digest of it."""
    group = getattr(get_current_trace(), "group_id", None)
    if made is None:
        given = conversation_id or group
        return thread_session(given.strip()) if given and given.strip() else None
    kind, _, mark = made.removeprefix(MADE_BY_SDK).partition(":")
    if kind == "run":
        return None
    session = _SESSIONS.get(mark)
    for known in (conversation_id, session.session_id if session is not None else None, group):
        if known and digest(known) == mark:
            return thread_session(known.strip())
    return legal_name(f"{kind}:{mark}")

"""LangChain and LangGraph: `ChatAgentMem`, `AgentMemMiddleware`, `AgentMemSaver`.

Each names the agent by its `lc_agent_name`, or the graph's node, and the session by the `thread_id`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.messages.utils import count_tokens_approximately
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import OpenAIContextOverflowError
from langgraph.config import get_config
from openai import BadRequestError
from pydantic import Field, SecretStr, model_validator

from agentmem.adapters.langgraph import AgentMemSaver
from agentmem.adapters.naming import cache_key, legal_name, thread_session
from agentmem.adapters.threads import Threads
from agentmem.daemon import find_endpoint
from agentmem.errors import ContextOverflow

__all__ = ["AgentMemMiddleware", "AgentMemSaver", "ChatAgentMem"]

MODEL_NODE = "model"
"""The node of `create_agent` that calls the model."""

RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun


class ChatAgentMem(ChatOpenAI):
    """ChatOpenAI on the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning.

    Every call says who speaks: `agent` and `session`, given here or with the call, else the names of the run.
    `usage_metadata["input_token_details"]["cache_read"]` counts the tokens that were remembered.
    """

    model_name: str = Field(default="default", alias="model")
    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    # A long prompt may take minutes to read, and ChatOpenAI would give up after two.
    stream_chunk_timeout: float | None = None

    url: str | None = Field(default=None, exclude=True)
    token: SecretStr | None = Field(default=None, exclude=True)
    home: str | Path | None = Field(default=None, exclude=True)
    agent: str | None = None
    session: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _find_daemon(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        values = dict(given)
        urls = [values.get("url"), values.pop("base_url", None), values.pop("openai_api_base", None)]
        tokens = [values.get("token"), values.pop("api_key", None), values.pop("openai_api_key", None)]
        token = next((token for token in tokens if token), None)
        if isinstance(token, SecretStr):
            token = token.get_secret_value()
        endpoint = find_endpoint(next((url for url in urls if url), None), token, values.get("home"))
        # ChatOpenAI fills gaps from the environment: a key or a proxy there is meant for other services.
        values |= {"base_url": f"{endpoint.url}/v1", "api_key": endpoint.token or "none"}
        if not values.get("openai_proxy"):
            values["openai_proxy"] = None
            values.setdefault("http_client", httpx.Client(trust_env=False))
            # No connection is kept: it would belong to one event loop, and the model may serve several.
            limits = httpx.Limits(max_keepalive_connections=0)
            values.setdefault("http_async_client", httpx.AsyncClient(trust_env=False, limits=limits))
        return values

    @property
    def _llm_type(self) -> str:
        return "chat-agentmem"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Never: it belongs to the daemon of this machine."""
        return False

    def get_num_tokens(self, text: str) -> int:
        """An estimate, as for messages."""
        return self.get_num_tokens_from_messages([HumanMessage(text)])

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None, **kwargs: Any
    ) -> int:
        """An estimate: ChatOpenAI would fetch the tokenizer of another model from the network."""
        return count_tokens_approximately(messages, tools=list(tools) if tools else None)

    def _named(self, run: RunManager | None, options: dict[str, Any]) -> dict[str, Any]:
        """`options` of a call with the key of who speaks. A key that somebody set stays, unless the call names an agent."""
        agent, session = options.pop("agent", None), options.pop("session", None)
        keyed = "prompt_cache_key" in options or "prompt_cache_key" in self.model_kwargs
        if keyed and agent is None and session is None:
            return options
        metadata = (run.metadata if run is not None else None) or {}
        key = run_key(metadata, agent or self.agent, session or self.session)
        return options if key is None else {**options, "prompt_cache_key": key}

    # Where a reply is streamed to somebody who listens to the graph, `_stream` is not told of the run: only these are.

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return super()._generate_with_cache(messages, stop, run_manager, **self._named(run_manager, kwargs))

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._named(run_manager, kwargs)
        return await super()._agenerate_with_cache(messages, stop, run_manager, **options)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _overflow():
            return super()._generate(messages, stop, run_manager, **self._named(run_manager, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _overflow():
            return await super()._agenerate(messages, stop, run_manager, **self._named(run_manager, kwargs))

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        with _overflow():
            yield from super()._stream(*args, **self._named(kwargs.get("run_manager"), kwargs))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        with _overflow():
            async for chunk in super()._astream(*args, **self._named(kwargs.get("run_manager"), kwargs)):
                yield chunk


class AgentMemMiddleware(AgentMiddleware):
    """Names the agent for any model that speaks OpenAI's API to the daemon, and warms its memory before it begins.

    `agent` goes before the names of the run. The daemon to warm is the one at `url`, by default the one that holds `home`.
    """

    def __init__(
        self,
        agent: str | None = None,
        *,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.agent = agent
        self._threads = Threads(url, token, home)

    def before_agent(self, state: Any, runtime: Any) -> None:
        """Warm the agent's memory while the rest is made ready."""
        self._threads.warm(self._to_warm())

    async def abefore_agent(self, state: Any, runtime: Any) -> None:
        await self._threads.awarm(self._to_warm())

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(self._named(request))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        return await handler(self._named(request))

    def _to_warm(self) -> str | None:
        return run_agent({**_metadata(), "langgraph_node": MODEL_NODE}, self.agent)

    def _named(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        settings = request.model_settings
        if {"prompt_cache_key", "agent", "session"} & settings.keys():
            return request
        model = request.model
        agent, session = (model.agent, model.session) if isinstance(model, ChatAgentMem) else (None, None)
        key = run_key(_metadata(), agent or self.agent, session)
        return request.override(model_settings={**settings, "prompt_cache_key": key}) if key else request


def run_agent(metadata: Mapping[str, Any], agent: str | None = None) -> str | None:
    """The agent of a run: `agent`, or as its metadata says."""
    named = agent or metadata.get("lc_agent_name") or metadata.get("langgraph_node")
    return str(named) if named else None


def run_key(metadata: Mapping[str, Any], agent: str | None = None, session: str | None = None) -> str | None:
    """`prompt_cache_key` of a run: what is given, else as its metadata says."""
    thread = metadata.get("thread_id")
    if session is not None:
        session = legal_name(session)
    elif thread is not None and thread != "":
        session = thread_session(thread)
    return cache_key(run_agent(metadata, agent), session)


@contextmanager
def _overflow() -> Iterator[None]:
    """What is too long, as the type that summarising middleware waits for: ChatOpenAI looks for a word in the message."""
    try:
        yield
    except BadRequestError as error:
        if error.code != ContextOverflow.code or isinstance(error, ContextOverflowError):
            raise
        raise OpenAIContextOverflowError(
            message=error.message, response=error.response, body=error.body
        ) from error


def _metadata() -> Mapping[str, Any]:
    return get_config().get("metadata") or {}

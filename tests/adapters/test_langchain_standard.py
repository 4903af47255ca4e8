"""LangChain's own suites for chat models, on `ChatAgentMem`."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from agentmem.adapters.langchain import ChatAgentMem
from tests.server.conftest import Daemon

pytestmark = pytest.mark.slow


class OnTheDaemon:
    """What both suites are told."""

    daemon: Daemon

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _served(cls, daemon: Daemon) -> None:
        cls.daemon = daemon

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAgentMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"url": self.daemon.url, "token": self.daemon.token}


class TestUnit(OnTheDaemon, ChatModelUnitTests):
    pass


def _own(name: str) -> Any:
    """A copy of a test of the suite, to be marked."""
    test = vars(ChatModelIntegrationTests)[name]
    copy = types.FunctionType(test.__code__, test.__globals__, name, test.__defaults__, test.__closure__)
    copy.__dict__.update(test.__dict__)
    return copy


class TestIntegration(OnTheDaemon, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # The tiny model babbles until it is stopped; with these it ends its strings and objects wherever it may.
        ends = {str(ord('"')): 100, str(ord("}")): 50}
        return {**super().standard_chat_model_params, "max_tokens": 200, "logit_bias": ends}

    @property
    def model_override_value(self) -> str:
        return self.daemon.http.get("/v1/models").json()["data"][0]["id"]


class TestCalls(ChatModelIntegrationTests):
    """What of the suite needs a model that understands a question, on one that does."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _served(cls, embedded_daemon: Daemon) -> None:
        cls.daemon = embedded_daemon  # type: ignore[attr-defined]

    chat_model_class = OnTheDaemon.chat_model_class
    chat_model_params = OnTheDaemon.chat_model_params

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {**super().standard_chat_model_params, "max_tokens": 160}


UNDERSTOOD = {
    "test_tool_calling": "the random model calls with other values",
    "test_tool_calling_async": "the random model calls with other values",
    "test_bind_runnables_as_tools": "the random model's text is empty",
    "test_unicode_tool_call_integration": "the random model copies nothing",
    "test_agent_loop": "the random model calls nothing of its own accord",
}
for name in dir(ChatModelIntegrationTests):
    if name.startswith("test_") and name not in UNDERSTOOD:
        setattr(TestCalls, name, None)
    elif name in UNDERSTOOD:
        setattr(TestIntegration, name, pytest.mark.xfail(reason=UNDERSTOOD[name])(_own(name)))
alone = pytest.mark.xfail(reason="135M parameters call no tool of their own accord")(_own("test_agent_loop"))
setattr(TestCalls, "test_agent_loop", alone)  # noqa: B010  (a method is no place to assign to)

# pytest-asyncio runs what is marked; a mark on the class would be on tests that are no coroutines, too.
for member in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(member):
        pytest.mark.asyncio(member)

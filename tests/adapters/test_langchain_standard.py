"""LangChain's own suites for chat models, on `ChatAgentMem`."""

from __future__ import annotations

import inspect
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
    def _served(cls, embedded_daemon: Daemon) -> None:
        cls.daemon = embedded_daemon

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAgentMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"url": self.daemon.url, "token": self.daemon.token}


class TestUnit(OnTheDaemon, ChatModelUnitTests):
    pass


class TestIntegration(OnTheDaemon, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # The tiny model babbles until it is stopped.
        return {**super().standard_chat_model_params, "max_tokens": 200}

    @property
    def model_override_value(self) -> str:
        return self.daemon.http.get("/v1/models").json()["data"][0]["id"]


# pytest-asyncio runs what is marked; a mark on the class would be on tests that are no coroutines, too.
for member in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(member):
        pytest.mark.asyncio(member)

"""Other people's clients, unmodified: LiteLLM and LangChain's OpenAI classes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # their imports take seconds

STORY = "The lighthouse keeper counts the ships that pass the northern cape every night of the winter. " * 3
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def lite(daemon, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")

    def ask(messages: list[dict[str, Any]], **fields: Any) -> Any:
        return litellm.completion(
            model="openai/default", api_base=f"{daemon.url}/v1", api_key=daemon.token, messages=messages,
            max_tokens=fields.pop("max_tokens", 8), prompt_cache_key=fields.pop("key", "lite"), **fields,
        )  # fmt: skip

    return ask


def test_litellm_talks_streams_and_reuses(lite) -> None:
    first = lite([{"role": "user", "content": STORY}])
    said = first.choices[0].message.content
    messages = [
        {"role": "user", "content": STORY},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And then?"},
    ]
    second = lite(messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 2
    chunks = list(lite([{"role": "user", "content": STORY}], stream=True, key="lite-stream"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_litellm_calls_tools(lite) -> None:
    reply = lite([{"role": "user", "content": STORY}], tools=[CLOCK], tool_choice="required", max_tokens=80)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")


def test_langchain_openai_talks_and_embeds(daemon) -> None:
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(
        base_url=f"{daemon.url}/v1", api_key=daemon.token, model="default", max_tokens=8, temperature=0,
        extra_body={"prompt_cache_key": "langchain"}, stream_usage=True,
    )  # fmt: skip
    first = model.invoke(STORY)
    second = model.invoke([("human", STORY), ("ai", first.content), ("human", "And then?")])
    assert (
        second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 2
    )
    assert "".join(chunk.content for chunk in model.stream(STORY))
    vectors = openai.OpenAIEmbeddings(
        base_url=f"{daemon.url}/v1", api_key=daemon.token, model="default", check_embedding_ctx_length=False
    )
    cat, kitten, money = np.array(vectors.embed_documents(["A cat sleeps.", "A kitten naps.", "Rates rose."]))
    assert cat @ kitten > cat @ money

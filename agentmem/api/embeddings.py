"""`POST /v1/embeddings`: vectors of texts, from the sentence encoder that tells episodes apart."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, Field, StrictInt

from agentmem.api.errors import UnknownModel, unsupported
from agentmem.api.fields import MAX_COUNT, Body, as_list
from agentmem.api.message import Text
from agentmem.api.service import MODEL_ALIASES, Service
from agentmem.errors import BadRequest

MAX_TEXTS = 2048


def _texts(value: Any) -> Any:
    """Texts; token ids are those of a tokenizer that nobody here knows."""
    numbers = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
    if isinstance(numbers, list) and numbers and isinstance(numbers[0], int):
        raise unsupported(
            "token ids are not supported; send text (LangChain: check_embedding_ctx_length=False)"
        )
    return as_list(value)


class EmbeddingsBody(Body):
    """Texts to embed. What is longer than the encoder reads at once is cut there; `usage` counts what was read."""

    input: Annotated[
        list[Annotated[Text, Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_TEXTS),
        BeforeValidator(_texts, json_schema_input_type=str | list[str]),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    user: str | None = None


def embeddings_router(service: Service) -> APIRouter:
    router = APIRouter()
    embedding = service.runtime.embedding

    @router.post("/v1/embeddings")
    def embed(body: EmbeddingsBody) -> dict[str, Any]:
        if body.model is not None and body.model not in MODEL_ALIASES | {embedding.name}:
            raise UnknownModel(
                f"the encoder {body.model[:80]!r} is not served here; use {embedding.name!r} or 'default'",
                param="model",
            )
        found = embedding.embed(body.input)
        dims = found.rows.shape[1]
        if body.dimensions not in (None, dims):
            raise BadRequest(f"this encoder's vectors have {dims} dimensions", param="dimensions")
        data = []
        for index, row in enumerate(found.rows):
            as_text = base64.b64encode(row.astype("<f4").tobytes()).decode()
            vector = as_text if body.encoding_format == "base64" else row.tolist()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return {"object": "list", "data": data, "model": found.encoder, "usage": usage}

    return router

"""`/v1/conversations`: what responses belong together, as an object of its own."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from agentmem.api import items
from agentmem.api.fields import Body
from agentmem.api.kept import Items, KeptConversation
from agentmem.api.responses import listed, namespace_of
from agentmem.api.service import Service
from agentmem.errors import NotFound

MAX_METADATA = 16
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=MAX_METADATA)]
GivenItems = Annotated[list[dict[str, Any]], Field(max_length=20)]


class ConversationBody(Body):
    """A new conversation, with what was said in it so far."""

    items: GivenItems | None = None
    metadata: Metadata | None = None


class MetadataBody(Body):
    metadata: Metadata


class ItemsBody(Body):
    items: GivenItems


def conversations_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/conversations")
    archive = service.archive

    def found(request: Request, id_: str) -> KeptConversation:
        return archive.conversation(id_, namespace_of(request))

    @router.post("")
    def create_conversation(request: Request, body: ConversationBody) -> dict[str, Any]:
        new = KeptConversation(
            items.new_id("conv"), namespace_of(request), None, None, time.time(), body.metadata or {}
        )
        archive.begin_conversation(new, items.given(body.items or [], "items"))
        return new.as_openai()

    @router.get("/{id}")
    def show_conversation(request: Request, id: str) -> dict[str, Any]:
        return found(request, id).as_openai()

    @router.post("/{id}")
    def describe_conversation(request: Request, id: str, body: MetadataBody) -> dict[str, Any]:
        archive.describe(found(request, id).id, body.metadata)
        return found(request, id).as_openai()

    @router.delete("/{id}")
    def delete_conversation(request: Request, id: str) -> dict[str, Any]:
        """Delete a conversation. What its agent remembers stays."""
        archive.delete_conversation(found(request, id).id)
        return {"id": id, "object": "conversation.deleted", "deleted": True}

    @router.get("/{id}/items")
    def list_items(
        request: Request, id: str, order: str = Query("desc", pattern="^(asc|desc)$")
    ) -> dict[str, Any]:
        """What was said, by default the newest first."""
        said = archive.items(found(request, id).id)
        return listed(said if order == "asc" else said[::-1])

    @router.post("/{id}/items")
    def add_items(request: Request, id: str, body: ItemsBody) -> dict[str, Any]:
        new = items.given(body.items, "items")
        archive.add_items(found(request, id).id, new)
        return listed(new)

    @router.get("/{id}/items/{item}")
    def show_item(request: Request, id: str, item: str) -> dict[str, Any]:
        return _item(archive.items(found(request, id).id), item)

    @router.delete("/{id}/items/{item}")
    def delete_item(request: Request, id: str, item: str) -> dict[str, Any]:
        archive.delete_item(found(request, id).id, item)
        return found(request, id).as_openai()

    return router


def _item(said: Items, id_: str) -> dict[str, Any]:
    for one in said:
        if one["id"] == id_:
            return items.shown(one)
    raise NotFound(f"there is no item {id_[:80]!r}", code="item_not_found")

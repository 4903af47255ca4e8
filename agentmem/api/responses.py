"""`/v1/responses`: turns that clients go on from by an id, in OpenAI's newer language."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from agentmem.api import items
from agentmem.api.archive import Archive
from agentmem.api.diagnostics import diagnosed
from agentmem.api.exchange import Exchange, answered, chat_request, first_event
from agentmem.api.identity import DEFAULT, Identity, resolve
from agentmem.api.kept import Items, Kept
from agentmem.api.responses_body import ResponsesBody
from agentmem.api.responses_stream import Writer, usage_fields
from agentmem.api.service import Service
from agentmem.api.sse import STREAMED, TurnStream
from agentmem.engine.request import check_name
from agentmem.errors import BadRequest, NotFound


class Draft:
    """A response that is being made: its id, what it follows, and what it was given."""

    def __init__(
        self, service: Service, archive: Archive, body: ResponsesBody, who: Identity, before: Items
    ) -> None:
        self.id, self.created = items.new_id("resp"), time.time()
        self.body, self.who, self._service, self._archive = body, who, service, archive
        self.given = items.given(body.input)
        self.before = before
        self.compared = self._kept(body.compared)

    def _kept(self, id_: str | None) -> dict[str, Any] | None:
        """A response that this one is compared with; None for one that is not there."""
        try:
            return self._archive.response(id_, self.who.namespace).body if id_ is not None else None
        except NotFound:
            return None

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation as the engine takes it. Raises BadRequest when there is none, NotFound for documents."""
        find = self._service.documents(self.who.namespace)
        found = items.messages(self.body.instructions, [*self.before, *self.given], find)
        if not found:
            raise BadRequest("there is no input", param="input", code="missing_required_parameter")
        return found

    def object(self, status: str, output: Items, **fields: Any) -> dict[str, Any]:
        """The response as the API shows it."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self.created),
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._service.runtime.model_name,
            "output": output,
            "usage": None,
            **self.body.repeated(),
            **fields,
        }

    def ended(self, output: Items, cut: bool, usage: dict[str, Any]) -> dict[str, Any]:
        """The complete response; `cut` when its last reply is not."""
        reason = {"reason": "max_output_tokens"} if cut else None
        found = self.object(
            "incomplete" if cut else "completed", output, incomplete_details=reason, usage=usage_fields(usage)
        )
        if self.body.compared is not None:
            found["prompt_cache_diagnostics"] = diagnosed(found, self.compared)
        return found

    async def keep(self, response: dict[str, Any]) -> None:
        """Make it possible to go on from it. Raises StoreError."""
        conversation = self.body.conversation
        if not self.body.kept and conversation is None:
            return
        who = self.who
        kept = Kept(
            self.id, who.namespace, who.agent, who.session, self.body.previous_response_id,
            conversation.id if conversation else None, response,
        )  # fmt: skip
        await run_in_threadpool(self._archive.keep, kept, self.given, response["output"])


def responses_router(service: Service) -> APIRouter:
    router = APIRouter()
    archive = service.archive

    @router.post("/v1/responses", responses=STREAMED)
    async def create_response(request: Request, body: ResponsesBody) -> Response:
        """One turn. It follows the response or the conversation that it names, or brings the whole conversation along."""
        service.check_model(body.model)
        draft = await run_in_threadpool(_draft, service, archive, request, body)
        tools = body.tooling()
        asked = chat_request(
            draft.who,
            body,
            await run_in_threadpool(draft.messages),
            tools,
            max_tokens=body.max_output_tokens,
            top_logprobs=body.ranked,
        )
        turn = await Exchange.begin(service, asked, tools, body.schema_wanted)

        async def answer() -> Response:
            exchange = Exchange(service, turn, await first_event(turn, bool(body.stream)), tools)
            if body.stream:
                return TurnStream(turn, Writer(exchange, draft).events(), exchange.headers)
            (reply,), usage = await exchange.whole()
            response = draft.ended(items.said(reply), reply.finish == "length", usage)
            await draft.keep(response)
            return JSONResponse(response, headers=exchange.headers)

        return await answered(request, answer(), turn)

    @router.get("/v1/responses/{id}")
    def show_response(request: Request, id: str) -> dict[str, Any]:
        return archive.response(id, namespace_of(request)).body

    @router.delete("/v1/responses/{id}")
    def delete_response(request: Request, id: str) -> dict[str, Any]:
        """Delete one response. What the agent remembers stays."""
        archive.delete(id, namespace_of(request))
        return {"id": id, "object": "response", "deleted": True}

    @router.get("/v1/responses/{id}/input_items")
    def input_items(
        request: Request, id: str, order: str = Query("desc", pattern="^(asc|desc)$")
    ) -> dict[str, Any]:
        """What a response was given, by default the newest first."""
        archive.response(id, namespace_of(request))
        found = archive.items(id, given=True)
        return listed(found if order == "asc" else found[::-1])

    return router


def listed(found: Items) -> dict[str, Any]:
    """A page with everything."""
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {
        "object": "list",
        "data": [items.shown(one) for one in found],
        "first_id": first,
        "last_id": last,
        "has_more": False,
    }


def namespace_of(request: Request) -> str:
    """The namespace of a request without a body. Raises BadRequest."""
    return check_name(request.headers.get("x-agentmem-namespace", DEFAULT), "namespace")


def _draft(service: Service, archive: Archive, request: Request, body: ResponsesBody) -> Draft:
    """Find what is gone on from, and who speaks: a conversation that nobody named is a session by its own id."""
    if body.previous_response_id is not None and body.conversation is not None:
        raise BadRequest("name a response or a conversation, not both", param="previous_response_id")
    namespace = request.headers.get("x-agentmem-namespace", body.agentmem.namespace) or DEFAULT
    before: Items = []
    owner: tuple[str, str] | None = None
    if body.previous_response_id is not None:
        last = archive.response(body.previous_response_id, namespace)
        before, owner = archive.history(last), (last.agent, last.session)
    elif body.conversation is not None:
        conversation = archive.conversation(body.conversation.id, namespace)
        before = archive.items(conversation.id)
        if conversation.agent is not None and conversation.session is not None:
            owner = conversation.agent, conversation.session
    who = resolve(request.headers, body, owner)
    draft = Draft(service, archive, body, who, before)
    if who.source == "anonymous" and (body.kept or body.conversation is not None):
        draft.who = who._replace(session=body.conversation.id if body.conversation else draft.id)
    return draft

"""`/v1/agents/{agent}/export` and `/v1/agents/import`: one agent as one file. Both need the token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from agentmem.api.agents import Agent, Namespace
from agentmem.api.service import Service
from agentmem.engine.request import check_name
from agentmem.errors import StoreError

PIECE = 1 << 20
BINARY = "application/octet-stream"
FILE: dict[str, Any] = {BINARY: {"schema": {"type": "string", "format": "binary"}}}


def transfer_router(service: Service) -> APIRouter:
    """Neither route holds a file in RAM: archives pass through nameless files in the home."""
    router = APIRouter(prefix="/v1/agents")
    runtime = service.runtime

    @router.post("/{agent}/export", response_class=StreamingResponse, responses={200: {"content": FILE}})
    def export_agent(agent: Agent, namespace: Namespace) -> Response:
        """The agent's archive: its log and its state, as they are stored."""
        file = runtime.transfer.export(agent, namespace)
        headers = {
            "content-length": str(os.fstat(file.fileno()).st_size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(agent, safe='')}.safetensors",
        }
        return StreamingResponse(
            _pieces(file), headers=headers, media_type=BINARY, background=BackgroundTask(file.close)
        )

    @router.post("/import", openapi_extra={"requestBody": {"required": True, "content": FILE}})
    async def import_agent(
        request: Request,
        namespace: Namespace,
        agent: Annotated[str | None, Query()] = None,
        trust: Annotated[bool, Query()] = False,
        force: Annotated[bool, Query()] = False,
    ) -> dict[str, Any]:
        """Make an agent of an archive. `trust` shares its pages with the namespace; `force` replaces an agent of its name.

        `kept` says what of it is of use here: `state`, or `tokens` when its state must be computed again, or `messages` when
        another tokenizer or chat template made its tokens.
        """
        name = None if agent is None else check_name(agent)
        try:
            file = await run_in_threadpool(runtime.transfer.scratch)
        except OSError as error:
            raise StoreError(f"the upload cannot be stored: {error}") from error
        with file:
            await _receive(request, file)
            outcome = await run_in_threadpool(
                runtime.transfer.admit, file, name, namespace, trust=trust, force=force
            )
        info = await run_in_threadpool(runtime.agent, outcome.pop("agent"), namespace)
        return {"agent": dict(info), **outcome}

    return router


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE):
            yield piece


async def _receive(request: Request, file: IO[bytes]) -> None:
    """The body into `file`, a piece at a time."""
    pending = bytearray()
    try:
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= PIECE:
                await run_in_threadpool(file.write, bytes(pending))
                pending.clear()
        await run_in_threadpool(file.write, bytes(pending))
        await run_in_threadpool(file.flush)
    except ClientDisconnect as error:
        raise StoreError("the upload broke off") from error
    except OSError as error:
        raise StoreError(f"the upload cannot be stored: {error}") from error

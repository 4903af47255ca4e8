"""The HTTP application over one runtime."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmem import __version__
from agentmem.api.agents import agents_router
from agentmem.api.anthropic import anthropic_router
from agentmem.api.chat import chat_router
from agentmem.api.compose import compose_router
from agentmem.api.conversations import conversations_router
from agentmem.api.daemon import daemon_router
from agentmem.api.embeddings import embeddings_router
from agentmem.api.errors import ErrorBody, install_handlers
from agentmem.api.jobs import jobs_router
from agentmem.api.metrics import Metrics
from agentmem.api.responses import responses_router
from agentmem.api.service import Service
from agentmem.api.store import upkeep_router
from agentmem.api.text import text_router
from agentmem.api.transfer import transfer_router
from agentmem.server.security import Bodies, Gate, Lock
from agentmem.server.tokens import Tokens, tokens_router

OPEN = "/health"
"""The route that answers without a token, though less."""
ROUTERS = (
    chat_router, text_router, responses_router, conversations_router, anthropic_router, embeddings_router,
    transfer_router, agents_router, jobs_router, upkeep_router, compose_router, daemon_router,
)  # fmt: skip
FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is refused"},
    "5XX": {"model": ErrorBody, "description": "the daemon failed"},
}


def create_app(service: Service, tokens: Tokens) -> FastAPI:
    """The application. `tokens` say who may ask what; see `security` for what is open without one."""
    settings = service.settings
    # No documentation pages: they load scripts from foreign servers.
    app = FastAPI(title="agentmem", version=__version__, docs_url=None, redoc_url=None, responses=FAILURES)
    install_handlers(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    for router in ROUTERS:
        app.include_router(router(service))
    app.include_router(tokens_router(tokens))
    # The last one added is the first to see a request.
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(Lock, settings=settings, tokens=tokens)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
        )
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The schema of the API with what opens it."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["token"] = {"type": "http", "scheme": "bearer"}
        for path, item in schema["paths"].items():
            for operation in item.values():
                operation["security"] = [] if path == OPEN else [{"token": []}]
        app.openapi_schema = schema
    return app.openapi_schema


class Counted:
    """Counts every answer by the route's pattern, never by its path: paths hold names and have no end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(_route(scope), message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:
            self.metrics.answered(_route(scope), 500)
            raise


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "none")

"""Models, health, store and metrics: what the daemon says of itself."""

from __future__ import annotations

import os
import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from agentmem import __version__
from agentmem.api.bodies import PruneBody
from agentmem.api.service import Service
from agentmem.engine.request import check_name


def daemon_router(service: Service) -> APIRouter:
    """Models, health, store and metrics."""
    router = APIRouter()
    runtime = service.runtime

    @router.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @router.get("/v1/models/{name:path}")
    def show_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @router.get("/health")
    def health(request: Request) -> dict[str, Any]:
        """`status` alone without the token, everything with it."""
        facts = {"status": "ok", **runtime.health()}
        if not request.state.trusted:
            return {"status": facts["status"]}
        return {
            **facts,
            "encryption": runtime.encryption(),
            "version": __version__,
            "pid": os.getpid(),
            "model": runtime.model_name,
            "max_context": runtime.max_context,
            "home": str(service.settings.home),
            "started": service.started,
            "uptime_s": time.time() - service.started,
        }

    @router.get("/v1/store")
    def store() -> dict[str, Any]:
        """Budgets and bytes."""
        return runtime.store()

    @router.post("/v1/store/prune")
    def prune(body: PruneBody) -> dict[str, Any]:
        """Drop from disk the state of agents that were not used for long; their tokens stay."""
        namespace = None if body.namespace is None else check_name(body.namespace, "namespace")
        return runtime.prune(float(body.older_s), namespace, body.dry_run)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
    def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router

"""`/v1/templates`, `/v1/documents`, `/v1/compose/verify`: what composed reuse is told, and how well it does. All need a token."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from agentmem.api.agents import PATTERN, Namespace
from agentmem.api.bodies import CalibrateBody, TextBody
from agentmem.api.service import Service
from agentmem.engine.request import check_name


def named(name: Annotated[str, Path(json_schema_extra=PATTERN)]) -> str:
    """The name of the path. Raises BadRequest."""
    return check_name(name, "name")


Name = Annotated[str, Depends(named)]


def compose_router(service: Service) -> APIRouter:
    """The routes run in worker threads: the runtime's methods block."""
    router = APIRouter(prefix="/v1")
    composed = service.runtime.composed

    @router.post("/compose/verify")
    def verify(body: CalibrateBody) -> dict[str, Any]:
        """Compare the last prompts of every template with dense runs, in idle time."""
        namespace = None if body.namespace is None else check_name(body.namespace, "namespace")
        return composed.verify(namespace, body.planner)

    @router.put("/templates/{name}")
    def declare(name: Name, namespace: Namespace, body: TextBody) -> dict[str, Any]:
        """Say where the slots of prompts are, like {{question}}."""
        composed.declare(namespace, name, body.text)
        return {"name": name, "text": body.text}

    @router.get("/templates/{name}")
    def show(name: Name, namespace: Namespace) -> dict[str, Any]:
        return {"name": name, "text": composed.template(namespace, name)}

    @router.delete("/templates/{name}")
    def withdraw(name: Name, namespace: Namespace) -> dict[str, Any]:
        composed.withdraw(namespace, name)
        return {"name": name, "deleted": True}

    @router.put("/documents/{name}")
    def register(name: Name, namespace: Namespace, body: TextBody) -> dict[str, Any]:
        """Look for a text in prompts, under a name."""
        return {"name": name, "tokens": composed.register(namespace, name, body.text)}

    @router.get("/documents")
    def documents(namespace: Namespace) -> dict[str, Any]:
        found = composed.documents(namespace)
        return {"object": "list", "data": [{"name": n, "tokens": t} for n, t in sorted(found.items())]}

    @router.get("/documents/{name}")
    def document(name: Name, namespace: Namespace) -> dict[str, Any]:
        """A document's text."""
        return {"name": name, "text": composed.document(namespace, name)}

    @router.delete("/documents/{name}")
    def unregister(name: Name, namespace: Namespace) -> dict[str, Any]:
        composed.unregister(namespace, name)
        return {"name": name, "deleted": True}

    return router

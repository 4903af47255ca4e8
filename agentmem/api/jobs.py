"""`/v1/jobs`: transcripts that are read in the background. All need the token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from agentmem.api.agents import Namespace
from agentmem.api.service import Service


def jobs_router(service: Service) -> APIRouter:
    """The routes run in worker threads: the methods of jobs block."""
    router = APIRouter(prefix="/v1/jobs")
    jobs = service.runtime.jobs

    @router.get("")
    def list_jobs(namespace: Namespace) -> dict[str, Any]:
        """Every job of a namespace, the oldest first; those that ended are kept for some days."""
        return {"object": "list", "data": jobs.all(namespace)}

    @router.get("/{id}")
    def show_job(id: str, namespace: Namespace) -> dict[str, Any]:
        return dict(jobs.show(id, namespace))

    @router.delete("/{id}")
    def cancel_job(id: str, namespace: Namespace) -> dict[str, Any]:
        """End a job; what was read stays. One that has ended stays as it is."""
        return dict(jobs.cancel(id, namespace))

    return router

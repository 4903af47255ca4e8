"""`/v1/store/verify` and `/v1/store/repair`: looking after what lies on disk. Both need the token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from agentmem.api.bodies import RepairBody, VerifyBody
from agentmem.api.service import Service


def upkeep_router(service: Service) -> APIRouter:
    """The routes run in worker threads: they read much."""
    router = APIRouter(prefix="/v1/store")
    runtime = service.runtime

    @router.post("/verify")
    def verify(body: VerifyBody) -> dict[str, Any]:
        """Whether all that is kept is as it was written. Changes nothing."""
        return runtime.upkeep.verify(deep=body.deep, rebuild=body.rebuild)

    @router.post("/repair")
    def repair(body: RepairBody) -> dict[str, Any]:
        """Put damaged extents aside, so that their tokens are read anew."""
        return runtime.upkeep.repair(purge_quarantine=body.purge)

    return router

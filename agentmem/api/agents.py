"""`/v1/agents`: list, create, show, change, fork, warm, evict, pin, append, explain, episodes, forget. All need the token."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from starlette.responses import JSONResponse

from agentmem.api.bodies import AppendBody, CreateBody, ForkBody, PolicyBody
from agentmem.api.service import Service
from agentmem.engine.request import NAME, ChatRequest, check_name

PATTERN: dict[str, Any] = {"pattern": f"^{NAME.pattern}$"}
"""What the schema says of names; `check_name` says it to those who did not read it."""


BEGUN: dict[str, Any] = {
    "description": "the job that reads it in the background",
    "content": {"application/json": {"schema": {"type": "object"}}},
}
TURN = r"^(last|[0-9]{1,9})$"


def named_agent(agent: Annotated[str, Path(json_schema_extra=PATTERN)]) -> str:
    """The agent of the path. Raises BadRequest."""
    return check_name(agent)


def named_namespace(namespace: Annotated[str, Query(json_schema_extra=PATTERN)] = "default") -> str:
    """The namespace of the query. Raises BadRequest."""
    return check_name(namespace, "namespace")


def named_session(session: Annotated[str | None, Query(json_schema_extra=PATTERN)] = None) -> str | None:
    """The session of the query, if one is named. Raises BadRequest."""
    return None if session is None else check_name(session, "session")


def named_own_session(session: Annotated[str, Path(json_schema_extra=PATTERN)]) -> str:
    """The session of the path. Raises BadRequest."""
    return check_name(session, "session")


Agent = Annotated[str, Depends(named_agent)]
OwnSession = Annotated[str, Depends(named_own_session)]
Namespace = Annotated[str, Depends(named_namespace)]
Session = Annotated[str | None, Depends(named_session)]


def agents_router(service: Service) -> APIRouter:
    """The routes run in worker threads: the runtime's methods block."""
    router = APIRouter(prefix="/v1/agents")
    runtime = service.runtime

    @router.get("")
    def list_agents(namespace: Namespace) -> dict[str, Any]:
        """Every agent of a namespace."""
        return {"object": "list", "data": runtime.agents(namespace)}

    @router.post("")
    def create_agent(namespace: Namespace, body: CreateBody) -> dict[str, Any]:
        """A new agent without turns."""
        return dict(runtime.create(check_name(body.agent), body.asked(), namespace))

    @router.get("/{agent}")
    def show_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        return dict(runtime.agent(agent, namespace))

    @router.delete("/{agent}")
    def forget_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        """Delete an agent and the state that no other agent uses. Cannot be undone."""
        freed = runtime.forget(agent, namespace)["bytes_freed"]
        service.archive.forget(namespace, agent)
        return {"agent": agent, "deleted": True, "bytes_freed": freed}

    @router.delete("/{agent}/sessions/{session}")
    def forget_session(agent: Agent, session: OwnSession, namespace: Namespace) -> dict[str, Any]:
        """Delete one session of an agent, and the state that nobody else uses. Cannot be undone."""
        freed = runtime.forget(agent, namespace, session)["bytes_freed"]
        service.archive.forget(namespace, agent, session)
        return {"agent": agent, "session": session, "deleted": True, "bytes_freed": freed}

    @router.post("/{agent}/warm")
    def warm_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        """Bring the agent's state from disk into RAM."""
        return dict(runtime.warm(agent, namespace))

    @router.post("/{agent}/evict")
    def evict_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        """Take the agent's state out of RAM; it stays on disk."""
        return dict(runtime.evict(agent, namespace))

    @router.patch("/{agent}")
    def change_agent(agent: Agent, namespace: Namespace, body: PolicyBody) -> dict[str, Any]:
        """Change what is asked of an agent: pinned, quota_bytes, reuse, planner, policy."""
        return dict(runtime.set_policy(agent, body.changes(), namespace))

    @router.post("/{agent}/pin")
    def pin_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        """Keep the agent's state when room is needed."""
        return dict(runtime.set_policy(agent, {"pinned": True}, namespace))

    @router.post("/{agent}/unpin")
    def unpin_agent(agent: Agent, namespace: Namespace) -> dict[str, Any]:
        return dict(runtime.set_policy(agent, {"pinned": False}, namespace))

    @router.post("/{agent}/fork")
    def fork_agent(agent: Agent, namespace: Namespace, body: ForkBody) -> dict[str, Any]:
        """A new agent that goes on from this one; nothing is copied."""
        session = None if body.session is None else check_name(body.session, "session")
        return dict(runtime.fork(agent, check_name(body.agent), session, body.at, namespace))

    @router.post("/{agent}/append", response_model=dict[str, Any], responses={202: BEGUN})
    def append_to_agent(agent: Agent, namespace: Namespace, body: AppendBody) -> Any:
        """Add to an agent's session without a reply. Returns the usage object, or with `background` at once the job."""
        request = ChatRequest(
            agent=agent,
            session=body.session,
            namespace=namespace,
            messages=body.normalised(service.documents(namespace)),
            history="server",
        )
        if body.background:
            return JSONResponse(dict(runtime.jobs.add(request)), 202)
        return runtime.append(request)

    @router.get("/{agent}/explain")
    def explain_agent(
        agent: Agent,
        namespace: Namespace,
        session: Session,
        turn: Annotated[str, Query(pattern=TURN)] = "last",
    ) -> dict[str, Any]:
        """Why a turn was reused as far as it was: the last one, or the one of this number in its session."""
        return runtime.explain(agent, session, namespace, None if turn == "last" else int(turn))

    @router.get("/{agent}/episodes")
    def agent_episodes(agent: Agent, namespace: Namespace, session: Session) -> dict[str, Any]:
        """What a session's conversation is about, and what of it is at hand."""
        return runtime.episodes(agent, session, namespace)

    return router

"""Every way a request can fail, with the HTTP status, type and code that the API reports for it."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class AgentMemError(Exception):
    """Base: `message` says what is wrong and what to do.

    `status` is the HTTP status, `type`/`code`/`param` the envelope's fields.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(AgentMemError):
    """The request cannot be served as it is written."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextOverflow(BadRequest):
    """Prompt and reply do not fit the model's context, or the prompt does not fit the RAM budget."""

    code = "context_length_exceeded"


class BadArchive(BadRequest):
    """A file to import is not what `export` writes. `code` names the way it is bad."""

    code = "archive_invalid"


class Unauthorized(AgentMemError):
    """No token, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(AgentMemError):
    """Refused by policy: host, origin, scope or quota."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(AgentMemError):
    """No such agent, session, model or route."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class Overloaded(AgentMemError):
    """The queue is full or memory is taken; worth another try after `retry_after_ms`."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class ModelUnavailable(AgentMemError):
    """The model cannot be found, fetched, read, or served."""

    status = 503
    type = "model_error"
    code = "model_unavailable"


class StoreError(AgentMemError):
    """The block store cannot be opened or written."""

    status = 503
    type = "store_error"
    code = "store_unavailable"


class AlreadyRunning(AgentMemError):
    """Another daemon holds this home."""

    status = 409
    type = "conflict_error"
    code = "already_running"


class AlreadyExists(AgentMemError):
    """An agent of this name is there already."""

    status = 409
    type = "conflict_error"
    code = "already_exists"


class ConversationBusy(AgentMemError):
    """A transcript is read into this session in the background."""

    status = 409
    type = "conflict_error"
    code = "conversation_busy"


class AgentLocked(AgentMemError):
    """The agent is encrypted, and its key is not there."""

    status = 423
    type = "permission_error"
    code = "agent_locked"


def reported(error: Exception) -> AgentMemError:
    """`error` as it is reported; one that is no AgentMemError is logged with its place."""
    if isinstance(error, AgentMemError):
        return error
    log.error("a request failed", exc_info=error)
    return AgentMemError(f"the request failed: {error}")

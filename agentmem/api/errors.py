"""Errors on the wire: OpenAI's envelope for every status, from every layer; Anthropic's on its routes."""

from __future__ import annotations

import logging
import math
import re
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from agentmem.errors import AgentMemError, BadRequest, ModelUnavailable, NotFound, Overloaded

log = logging.getLogger(__name__)

UNSUPPORTED = "unsupported_parameter"
WORTH_ANOTHER_TRY = frozenset({408, 409, 429})
ANTHROPIC = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error",
}  # fmt: skip


class ErrorFields(BaseModel):
    """What went wrong, in OpenAI's words. `param` is the dotted name of a field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorFields


class AnthropicErrorFields(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of every answer of Anthropic's routes that is not a success."""

    type: Literal["error"]
    error: AnthropicErrorFields


class TooLarge(BadRequest):
    """The request body is larger than the daemon takes."""

    status = 413
    code = "body_too_large"


class HeadTooLarge(BadRequest):
    """The request line and headers are larger, or more, than the daemon takes."""

    status = 431
    code = "head_too_large"


class WrongContentType(BadRequest):
    """A body that is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class TooSlow(AgentMemError):
    """The request did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class UnknownModel(NotFound):
    """The request names a model that this daemon does not serve."""

    type = "invalid_request_error"
    code = "model_not_found"


def unsupported(message: str) -> PydanticCustomError:
    """For validators: a feature that the API knows and this daemon does not have."""
    return PydanticCustomError(UNSUPPORTED, "{message}", {"message": message})


def invalid(message: str) -> PydanticCustomError:
    """For validators: a value that makes no sense."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def envelope(error: AgentMemError) -> dict[str, Any]:
    """The body that stands for `error`."""
    fields = ErrorFields(message=error.message, type=error.type, param=error.param, code=error.code)
    return ErrorBody(error=fields).model_dump()


def body_of(error: AgentMemError, path: str) -> dict[str, Any]:
    """The body that stands for `error` in the language of the route: Anthropic's on its routes, OpenAI's on all others."""
    if path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/"):
        kind = ANTHROPIC_TYPES.get(
            error.status, "api_error" if error.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return envelope(error)


def error_response(error: AgentMemError, path: str) -> JSONResponse:
    """The whole answer that stands for `error` on the route of `path`, with the headers that steer a client's retries."""
    headers: dict[str, str] = {}
    permanent = error.status < 500 and error.status not in WORTH_ANOTHER_TRY
    if permanent or isinstance(error, ModelUnavailable):
        headers["x-should-retry"] = "false"
    if isinstance(error, Overloaded):
        headers["retry-after-ms"] = str(error.retry_after_ms)
        headers["retry-after"] = str(math.ceil(error.retry_after_ms / 1000))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error, path), error.status, headers)


_IN_OUR_WORDS = {
    "too_short": "needs at least {min_length}",
    "too_long": "takes at most {max_length}",
    "string_too_long": "takes at most {max_length} characters",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
}


def from_validation(error: RequestValidationError) -> BadRequest:
    """The first thing wrong with a request, named by its dotted field."""
    first = error.errors()[0]
    place = [str(step) for step in first["loc"]]
    kind = first["type"]
    if kind == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = ".".join(place[1:]) or None
    message = _IN_OUR_WORDS[kind].format(**first.get("ctx", {})) if kind in _IN_OUR_WORDS else first["msg"]
    if kind == "missing":
        return BadRequest(
            f"{param or 'a JSON body'} is required", param=param, code="missing_required_parameter"
        )
    return BadRequest(
        f"{param}: {message}" if param else message,
        param=param,
        code=UNSUPPORTED if kind == UNSUPPORTED else None,
    )


def from_http(error: HTTPException) -> AgentMemError:
    """The framework's own refusals: no such route, wrong method, unreadable body."""
    if error.status_code == 404:
        return NotFound("no such route; see GET /openapi.json for those there are", code="route_not_found")
    if error.status_code == 405:
        refusal: AgentMemError = BadRequest("this route does not take that method", code="method_not_allowed")
    elif error.status_code == 400:
        # The framework raises this one only when it cannot decode a body.
        refusal = BadRequest("the body is not valid JSON", code="invalid_json")
    elif error.status_code < 500:
        refusal = BadRequest(str(error.detail))
    else:
        refusal = AgentMemError(str(error.detail))
    refusal.status = error.status_code
    return refusal


def _methods(app: FastAPI, path: str) -> set[str]:
    """What may be asked of a path: each method is a route of its own, which knows of no other."""
    described = app.openapi()["paths"]
    found = [described[path]] if path in described else [
        operations
        for template, operations in described.items()
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path)
    ]  # fmt: skip
    return {method.upper() for operations in found for method in operations}


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure in the envelope."""

    @app.exception_handler(AgentMemError)
    async def _ours(request: Request, error: AgentMemError) -> JSONResponse:
        if error.status >= 500:
            log.error("%s %s: %s", request.method, request.url.path, error.message)
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(from_validation(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(from_http(error), request.url.path)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["allow"] = ", ".join(sorted(_methods(app, request.url.path)))
        return response

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return error_response(
            AgentMemError("internal error; the daemon's log has the details"), request.url.path
        )

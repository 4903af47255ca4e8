"""The tokens that the running daemon takes, and `POST /v1/token/rotate`."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from threading import Lock
from typing import Any

from fastapi import APIRouter

from agentmem.api.bodies import RotateBody
from agentmem.errors import StoreError
from agentmem.home import Home
from agentmem.tokens import TokenScope, load_token, renew_token


class Tokens:
    """Both tokens of a home, as bytes to compare with. Precondition: the home is held."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = Lock()
        self.all = load_token(home).encode()
        self.inference = load_token(home, "inference").encode()

    def scope_of(self, shown: Iterable[bytes]) -> TokenScope | None:
        """The widest scope that one of these tokens opens. Takes as long for a wrong token as for one that is nearly right."""
        scope: TokenScope | None = None
        for token in shown:
            if hmac.compare_digest(token, self.all):
                return "all"
            if hmac.compare_digest(token, self.inference):
                scope = "inference"
        return scope

    def rotate(self, scope: TokenScope) -> None:
        """Make a new token. The old one is refused from here on; when the file cannot be written, it stays."""
        with self._lock:
            try:
                token = renew_token(self._home, scope).encode()
            except OSError as error:
                raise StoreError(f"the token file cannot be written: {error}") from error
            if scope == "all":
                self.all = token
            else:
                self.inference = token


def tokens_router(tokens: Tokens) -> APIRouter:
    router = APIRouter(prefix="/v1/token")

    @router.post("/rotate")
    def rotate(body: RotateBody) -> dict[str, Any]:
        """Replace a token, in its file and in the daemon. Whoever may read the file finds it there."""
        tokens.rotate(body.scope)
        return {"scope": body.scope, "rotated": True}

    return router

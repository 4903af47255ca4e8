"""The home's two tokens, as files: one opens every route, the other inference only."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Literal

from agentmem.errors import Forbidden
from agentmem.home import Home, private

log = logging.getLogger(__name__)

TOKEN_BYTES = 32
SHORTEST_TOKEN = 16

TokenScope = Literal["all", "inference"]


def token_path(home: Home, scope: TokenScope) -> Path:
    return home.inference_token if scope == "inference" else home.token


def load_token(home: Home, scope: TokenScope = "all") -> str:
    """A token of the home, made at the first start. Only its owner can read the file. Precondition: the home is held."""
    path = token_path(home, scope)
    return read_token(path) if os.path.lexists(path) else renew_token(home, scope)


def renew_token(home: Home, scope: TokenScope) -> str:
    """Make a new token and put it into its file in one step. Precondition: the home is held."""
    path = token_path(home, scope)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    # A process that dies here must not leave an empty token, which the next start would refuse.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="ascii", opener=private) as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return token


def read_token(path: Path) -> str:
    """Raises Forbidden for a file that is not this user's alone, and for a text that is no secret."""
    try:
        descriptor = private(path, os.O_RDONLY)
    except OSError as error:
        raise Forbidden(f"cannot read the token file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        facts = os.fstat(file.fileno())
        if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode):
            raise Forbidden(f"the token file {path} is not a file of this user")
        if facts.st_mode & 0o077:
            log.warning("the token file was readable by others; narrowed to its owner")
            os.fchmod(file.fileno(), 0o600)
        token = file.read().strip()
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable() and " " not in token):
        raise Forbidden(f"the token file {path} holds no usable token; delete it to get a new one")
    return token

"""Exit codes: what a script learns from how a command ended."""

from __future__ import annotations

from enum import IntEnum

from agentmem.daemon import DaemonNotRunning
from agentmem.errors import (
    AgentLocked,
    AgentMemError,
    AlreadyExists,
    AlreadyRunning,
    BadArchive,
    BadRequest,
    ContextOverflow,
    ConversationBusy,
    Forbidden,
    NotFound,
    Overloaded,
    StoreError,
    Unauthorized,
)


class Exit(IntEnum):
    """The meaning of every exit code, the same in all commands."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_RUNNING = 3
    NOT_FOUND = 4
    REFUSED = 5
    INTEGRITY = 6
    WARNINGS = 7
    INTERRUPTED = 130


# The first class that fits decides, so a subclass stands before its base.
_CODES: tuple[tuple[type[AgentMemError], Exit], ...] = (
    (DaemonNotRunning, Exit.NOT_RUNNING),
    (ContextOverflow, Exit.REFUSED),
    (BadArchive, Exit.INTEGRITY),
    (BadRequest, Exit.USAGE),
    (NotFound, Exit.NOT_FOUND),
    (Unauthorized, Exit.REFUSED),
    (AgentLocked, Exit.REFUSED),
    (Forbidden, Exit.REFUSED),
    (Overloaded, Exit.REFUSED),
    (ConversationBusy, Exit.REFUSED),
    (AlreadyExists, Exit.REFUSED),
    (AlreadyRunning, Exit.REFUSED),
    (StoreError, Exit.INTEGRITY),
)


def exit_code(error: AgentMemError) -> Exit:
    """The exit code that `error` stands for."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.FAILURE)

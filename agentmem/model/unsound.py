"""One error for whatever a library raises over a model that is not sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentmem.errors import AgentMemError, ModelUnavailable


@contextmanager
def unsound(what: str) -> Iterator[None]:
    """Raises ModelUnavailable with the cause for any other exception inside. `what` begins its message."""
    try:
        yield
    except AgentMemError:
        raise
    except Exception as error:
        raise ModelUnavailable(f"{what}: {type(error).__name__}: {error}") from error

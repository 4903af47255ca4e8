"""Names that the daemon takes, made of those that frameworks give to agents and threads."""

from __future__ import annotations

import hashlib
import re

LEGAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
UNNAMED = "default"
"""The session of a client that names none."""


def legal_name(text: str) -> str:
    """`text` itself where the daemon takes it, else what is readable of it with a digest of all of it."""
    if LEGAL.fullmatch(text) and ".." not in text:
        return text
    readable = re.sub(r"[^A-Za-z0-9._:@-]+", "-", re.sub(r"\.{2,}", ".", text))
    readable = readable.lstrip("._:@-")[:96].rstrip("._:@-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable or 'name'}-{digest}"


def thread_session(thread: object) -> str:
    """The session that holds a thread. No thread's is the one of clients that name none: it dies with the thread."""
    text = str(thread)
    return legal_name(text) if text != UNNAMED else legal_name(f"{UNNAMED}/")


def cache_key(agent: str | None, session: str | None) -> str | None:
    """`prompt_cache_key` of an agent's session; a session alone is an agent of its own. None when nobody is named."""
    if agent and session:
        return f"{legal_name(agent)}/{session}"
    return legal_name(agent) if agent else session or None

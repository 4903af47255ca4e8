"""Named points at which a process can be made to die, to prove that what it acknowledged survives.

`AGENTMEM_FAILPOINT=name:n` kills the process with SIGKILL when it passes the point for the n-th time. Without the variable a
point costs one look into an empty dictionary.
"""

from __future__ import annotations

import os
import signal

FAILPOINTS = (
    "file.begin",
    "file.written",
    "file.synced",
    "file.renamed",
    "file.durable",
    "index.begin",
    "index.changed",
    "index.committed",
    "commit.done",
    "drop.begin",
    "drop.done",
    "unlink.begin",
    "unlink.done",
    "forget.committed",
    "forget.unlinked",
    "forget.done",
    "compact.committed",
    "compact.done",
    "evict.committed",
    "evict.done",
    "quarantine.committed",
    "quarantine.moved",
    "quarantine.done",
    "close.checkpointed",
    "salvage.written",
    "salvage.published",
    "salvage.aside",
    "salvage.done",
)
FOLDING = ("topics.grown", "view.begun", "view.scored", "view.placed", "view.kept", "view.dropped")
"""The points of an agent whose memory is not kept whole; no other passes them."""

_left: dict[str, int] = {}


def arm(setting: str) -> None:
    """Make one point deadly, as `AGENTMEM_FAILPOINT` would. Raises ValueError for a point that does not exist."""
    _left.clear()
    name, _, n = setting.partition(":")
    if name and name not in (*FAILPOINTS, *FOLDING):
        raise ValueError(f"there is no failpoint {name!r}")
    if name:
        _left[name] = int(n or 1)


def failpoint(name: str) -> None:
    """Die here, when that is asked for."""
    if name in _left:
        _left[name] -= 1
        if _left[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("AGENTMEM_FAILPOINT", ""))

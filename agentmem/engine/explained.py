"""Why a turn was remembered as far as it was, with the place where its messages left those of its session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentmem.blockpool.index import TurnRow

AROUND = 40
"""Characters shown on each side of a difference."""
DIVERGED = frozenset({"input_changed", "system_changed", "tools_changed"})


def explained(agent: str, turn: TurnRow, turns: Sequence[TurnRow]) -> dict[str, Any]:
    """What is told of a turn of a session with these `turns`; for messages that changed, where and how they did, and the cost.

    `lost_tokens` of the session before could not be used; `lost_ms` is what as many took to be read in that very turn.
    """
    stats = {name: value for name, value in turn.stats.items() if name != "tools"}
    told = {"agent": agent, "turn": turn.n, "created": turn.created, **stats}
    lost = max(0, stats["session_tokens_before"] - stats["kept_tokens"])
    read = stats["prefilled_tokens"]
    told["lost_tokens"] = lost
    told["lost_ms"] = round(stats["prefill_ms"] * min(lost, read) / read, 3) if read else 0.0
    if stats["reason"] in DIVERGED and (place := _diverged(turn, turns)):
        told["diverged"] = place
    return told


def _diverged(turn: TurnRow, turns: Sequence[TurnRow]) -> dict[str, Any] | None:
    """The first message that is not the session's; None where the log does not go back so far."""
    before: list[dict[str, Any]] = []
    for one in turns:
        if one.n >= turn.n:
            break
        before = [*before[: one.keep_messages], *one.messages]
    at = turn.keep_messages
    if at >= len(before) or not turn.messages:
        return None
    old, new = before[at], turn.messages[0]
    return {"message": at, "role": new["role"], **difference(_text(old), _text(new))}


def difference(old: str, new: str) -> dict[str, Any]:
    """Where two texts begin to differ: the line (from 1), and what stands there in each."""
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    start = max(0, same - AROUND)
    line = new.count("\n", 0, same) + 1
    return {"line": line, "before": old[start : same + AROUND], "after": new[start : same + AROUND]}


def _text(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return f"{message.get('content') or ''}{calls or ''}"

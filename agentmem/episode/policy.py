"""How much of its past an agent keeps at hand. No MLX in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

LEAST_BUDGET = 256
BLOCK = 1024
"""Tokens beside an episode's own after which they compete for its places."""
MOST_EPISODES = 8

Tokens = Annotated[int, Field(strict=True, ge=LEAST_BUDGET, lt=1 << 31)]


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Full(_Policy):
    """Every token that was ever said."""

    kind: Literal["full"] = "full"


class Episodic(_Policy):
    """One episode of the conversation at a time, `budget_tokens` of it, and the newest tokens, up to `block_tokens`.

    `episodes`: how many there are; by the length of the conversation where nobody says. A history that is not longer than
    budget and block together is kept whole.
    """

    kind: Literal["episodic"] = "episodic"
    budget_tokens: Tokens
    episodes: Annotated[int, Field(strict=True, ge=1, le=MOST_EPISODES)] | None = None
    block_tokens: Tokens = BLOCK


class Window(_Policy):
    """The first `sinks` tokens and the newest `recent` ones, give or take a page (StreamingLLM)."""

    kind: Literal["window"] = "window"
    sinks: Annotated[int, Field(strict=True, ge=0, le=64)] = 4
    recent: Tokens


MemoryPolicy = Annotated[Full | Episodic | Window, Field(discriminator="kind")]
FULL = Full()
_ADAPTER: TypeAdapter[Full | Episodic | Window] = TypeAdapter(MemoryPolicy)


def memory_policy(policy: Mapping[str, Any]) -> Full | Episodic | Window:
    """What an agent's policies, as its row has them, say under `memory`; `FULL` where they say nothing."""
    said = policy.get("memory")
    return FULL if said is None else _ADAPTER.validate_python(said)


def stretch(policy: Full | Episodic | Window, known: int, prompt: int) -> int:
    """Tokens of a prompt, `known` of which are remembered, up to which it may be read before the past is cut down."""
    if isinstance(policy, Full):
        return prompt
    whole = (
        policy.budget_tokens + policy.block_tokens if isinstance(policy, Episodic) else policy.recent + BLOCK
    )
    if prompt <= whole:
        return prompt
    block = policy.block_tokens if isinstance(policy, Episodic) else BLOCK
    return min(prompt, max(whole, known + block))


def most_rows(policy: Full | Episodic | Window, page_tokens: int) -> int | None:
    """Tokens of a past and a prompt that have rows at once, at most; None for all of them."""
    if isinstance(policy, Episodic):
        return policy.budget_tokens + 3 * policy.block_tokens + page_tokens
    if isinstance(policy, Window):
        return policy.sinks + policy.recent + 2 * BLOCK + page_tokens
    return None

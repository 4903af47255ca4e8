"""What an agent or a request allows."""

from __future__ import annotations

from dataclasses import dataclass

from agentmem.compose.anchors import MINIMUM
from agentmem.compose.reuse import DEFAULT, PLANNERS, Reuse
from agentmem.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """How a prompt may be made.

    fallback: the planner where the first one has too few anchors, or "dense". hops: composed state that may be composed again;
    0 is exact state only. minimum: anchors below which a slot is not composed. Raises BadRequest for what does not exist.
    """

    reuse: Reuse = "exact"
    planner: str = DEFAULT
    fallback: str = "dense"
    hops: int = 0
    minimum: int = MINIMUM

    def __post_init__(self) -> None:
        if self.planner not in PLANNERS:
            raise BadRequest(f"there is no planner {self.planner!r}; there are {', '.join(PLANNERS)}")
        if self.fallback not in ("dense", "lego"):
            raise BadRequest("fall back to 'dense' or 'lego'", param="fallback")

    @property
    def composes(self) -> bool:
        return self.reuse in ("composed", "auto")

"""What a turn starts from."""

from __future__ import annotations

from dataclasses import dataclass

from agentmem.blockpool.page import Match
from agentmem.engine.checkpoints import Checkpoint
from agentmem.engine.shown import Shown


@dataclass(frozen=True, slots=True)
class Past:
    """`match` has all pages that must be in RAM: those that are `shown` in place of older ones, then those that are whole.

    `ready` is False where the state must be cut down first. `notes` say what was chosen, and why; `episode` is whose view it is.
    The pages of the `checkpoint` that it goes on from come last; rows of `remembered` tokens are there, which do not do alone.
    """

    match: Match
    shown: Shown | None = None
    ready: bool = True
    notes: tuple[str, ...] = ()
    episode: int | None = None
    checkpoint: Checkpoint | None = None
    remembered: int = 0

    @property
    def newer(self) -> Match:
        """What is behind `shown`."""
        if self.checkpoint is not None:
            return self.match._replace(pages=self.match.pages[: -len(self.checkpoint.pages)])
        if self.shown is None:
            return self.match
        pages = self.match.pages[len(self.shown.pages) :]
        return Match(pages, self.match.rows, self.match.tokens - self.shown.tokens)


NOTHING = Past(Match([], 0, 0))

"""What a table shows of a past that it does not hold whole."""

from __future__ import annotations

from dataclasses import dataclass

from agentmem.blockpool.page import Page


@dataclass(frozen=True, slots=True)
class Shown:
    """Rows in place of the first `tokens` tokens: the first `sinks` rows of the page `first`, and those of the pages `view`.

    `base` is the page of the session's chain that ends at `tokens`, behind which its newer pages come.
    """

    first: Page
    sinks: int
    view: tuple[Page, ...]
    tokens: int
    base: Page

    @property
    def pages(self) -> list[Page]:
        """What must be in RAM to show it."""
        return [*([self.first] if self.sinks else []), *self.view]

    @property
    def rows(self) -> int:
        return self.sinks + sum(page.rows for page in self.view)

    @property
    def gap(self) -> int:
        """Tokens that have no row."""
        return self.tokens - self.rows

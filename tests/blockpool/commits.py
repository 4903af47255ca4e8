"""Commits as the engine makes them, for tests of index and store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmem.blockpool.index import AgentRow, ExtentRow, SessionRow, TurnCommit, TurnRow
from agentmem.blockpool.page import Page, PageTree, Piece


class Author:
    """Makes commits of one agent's one session with fresh ids."""

    def __init__(self, id: int = 1, namespace: str = "default", name: str = "") -> None:
        self.agent = AgentRow(id, namespace, name or f"agent-{id}", 100.0 + id, 100.0 + id, {})
        self.session = SessionRow(id, id, "main", None)
        self.tree = PageTree("fingerprint", namespace)
        self.last: Page | None = None
        self.first_id = 1000 * id

    def turn(self, tokens: Sequence[int], keep: int = 0) -> TurnRow:
        n = len(self.session.turns) + 1
        row = TurnRow(
            n=n,
            keep_tokens=keep,
            keep_messages=n - 1,
            ids=np.array(tokens, np.int32),
            spans=[["prompt", len(tokens) - 1, None], ["reply", 1, "�ü"]],
            messages=[{"role": "user", "content": f"turn {n} ✓"}],
            stats={"reason": "extended", "n": n},
            created=200.0 + n,
        )
        self.session.turns.append(row)
        self.agent.totals["turns"] = n
        return row

    def commit(self, tokens: Sequence[int], *, extent: str | None, dropped: Sequence[int] = ()) -> TurnCommit:
        """A turn that adds one page of `tokens`, its rows in a new extent called `extent` (None: no page)."""
        turn = self.turn(tokens)
        if extent is None:
            return TurnCommit(self.agent, self.session, turn, self.last, [], list(dropped))
        number = self.first_id + turn.n
        page = self.tree.add(self.last or self.tree.root, np.array(tokens), raw=self.last is None)
        page.id, self.last = number, page
        pieces = (Piece(number, page.raw, 0, 0, len(tokens)),)
        row = ExtentRow(number, extent, 10 * number)
        return TurnCommit(self.agent, self.session, turn, page, [(page, pieces)], list(dropped), row)

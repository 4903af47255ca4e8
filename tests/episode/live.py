"""An agent's state in a small budget: one view of its store at a time, and the newest tokens beside every view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from agentmem.episode.fold import folded
from agentmem.episode.selection import Heads
from agentmem.episode.store import MemoryStore
from agentmem.episode.views import View, materialised
from agentmem.model.network import Network


class Live:
    """| view: the active episode's rows | tail: every token since, the same for all episodes |

    `held` is what attention sees. Switching changes the view and never the tail: what was just said is known to all episodes.
    """

    def __init__(
        self, network: Network, store: MemoryStore, views: Mapping[int, View], dtype: mx.Dtype,
        budgets: Sequence[int], *, block: int, active: int, heads: Heads = Heads.UNIFORM,
    ) -> None:  # fmt: skip
        self._network, self._dtype, self._budgets, self._heads = network, dtype, budgets, heads
        self.store, self.views, self.active, self.block = store, dict(views), active, block
        self.held = materialised(network, store, self.views[active], dtype)

    @property
    def tail(self) -> int:
        """Tokens that are not in the store yet."""
        return self.held.tokens - self.store.tokens

    def behind(self, episode: int) -> int:
        """Tokens since the episode's view was made: rows beside its budget until they are folded."""
        return self.held.tokens - self.views[episode].tokens

    def switch(self, episode: int) -> None:
        """Show another episode's rows. Nothing is done for the one that is shown."""
        if episode == self.active:
            return
        tails = self._tails()
        self.active = episode
        self.held = materialised(self._network, self.store, self.views[episode], self._dtype)
        for line, tail in zip(self.held.lines, tails, strict=True):
            line.tail = mx.concatenate([line.tail, tail], axis=1)
        self.held.tokens += tails[0].shape[1]

    def store_tail(self) -> None:
        """Move the tail's rows into the store; they stay visible, to every view, until it is folded."""
        if self.tail:
            self.store.append(self._tails())

    def fold(self, episode: int, prompt: Sequence[int]) -> None:
        """Let the rows since an episode's view was made compete for its places."""
        self.store_tail()
        self.views[episode] = folded(
            self._network, self.store, self.views[episode], prompt, self._budgets, self._dtype,
            block=self.block, heads=self._heads,
        )  # fmt: skip
        if episode == self.active:
            self.held = materialised(self._network, self.store, self.views[episode], self._dtype)

    def _tails(self) -> list[mx.array]:
        """The rows [heads, tail, width] of each layer that are not in the store."""
        return [line.tail[:, line.tail.shape[1] - self.tail :] for line in self.held.lines]

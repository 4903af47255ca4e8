"""Reading a long transcript within a budget (EpiCache, section 3.2): block by block, each scored and cut before the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.episode.baselines import Policy
from agentmem.episode.held import PIECE, SINKS, Held
from agentmem.episode.rows import LayerKind
from agentmem.episode.selection import Heads
from agentmem.errors import ContextOverflow
from agentmem.model.network import Network

BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """`budgets`: rows a head that each layer keeps, on average where heads are ragged; `block`: tokens between evictions."""

    budgets: tuple[int, ...]
    block: int = BLOCK
    heads: Heads = Heads.UNIFORM
    sinks: int = SINKS

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError("a block has one token at least")
        if min(self.budgets) <= self.sinks:
            raise ValueError(f"a budget of {min(self.budgets)} rows has no room beside {self.sinks} sinks")


class Builder:
    """One episode's rows in the making, a block each `step`: whoever calls may do other things between two of them.

    In memory are at most `plan.budgets` and a block's rows a head, and what the scoring prompt needs while it is read.
    """

    def __init__(
        self, network: Network, kinds: Sequence[LayerKind], dtype: mx.Dtype, ids: Sequence[int], policy: Policy,
        plan: Plan, *, max_context: int, held: Held | None = None,
    ) -> None:  # fmt: skip
        """Raises ContextOverflow where positions would leave the range that the model was trained on."""
        reach = policy.reach(min(plan.block, len(ids)))
        if len(ids) + reach > max_context:
            raise ContextOverflow(
                f"A history of {len(ids)} tokens and a scoring prompt of {reach} leave the {max_context} positions "
                "that this model was trained on; import a part of it, or use a model with a longer context"
            )
        self.ids, self.policy, self.plan = list(ids), policy, plan
        self.held = held or Held.empty(network, kinds, dtype, plan.sinks)
        self.most = self.held.most_rows()

    @property
    def done(self) -> bool:
        return self.held.tokens >= len(self.ids)

    def step(self) -> bool:
        """Read the next block, score, evict; returns whether that was the last one."""
        if self.done:
            return True
        block = self.ids[self.held.tokens : self.held.tokens + self.plan.block]
        self.held.absorb(block, piece=min(PIECE, self.plan.block))
        self.most = [max(a, b) for a, b in zip(self.most, self.held.most_rows(), strict=True)]
        bounds = [budget + self.plan.block for budget in self.plan.budgets]
        assert all(n <= bound for n, bound in zip(self.most, bounds, strict=True)), (
            "more rows than a budget and a block"
        )
        if self.held.over(self.plan.budgets):
            self.held.evict(self.policy.score(self.held, block), self.plan.budgets, self.plan.heads)
        return self.done

    def run(self) -> Held:
        """All the steps that are left."""
        while not self.step():
            pass
        return self.held

    def checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `resumed` needs beside the arguments that this was made with: plain arrays, and what JSON can say."""
        arrays, meta = self.held.arrays()
        return arrays, meta | {"most": self.most, "length": len(self.ids), "budgets": list(self.plan.budgets)}

    @classmethod
    def resumed(
        cls, network: Network, kinds: Sequence[LayerKind], dtype: mx.Dtype, ids: Sequence[int], policy: Policy,
        plan: Plan, arrays: dict[str, np.ndarray], meta: dict[str, Any], *, max_context: int,
    ) -> Builder:  # fmt: skip
        """Where a checkpoint was made, bit for bit. Raises ValueError for a checkpoint of another history or other budgets."""
        if meta["length"] != len(ids) or tuple(meta["budgets"]) != plan.budgets:
            raise ValueError("this checkpoint is of another history or of other budgets")
        held = Held.of_arrays(network, kinds, dtype, arrays, meta)
        made = cls(network, kinds, dtype, ids, policy, plan, max_context=max_context, held=held)
        made.most = [float(n) for n in meta["most"]]
        return made

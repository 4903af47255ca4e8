"""A trial: one prompt read and composed, on tables of its own, and how far the two predict the same."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from agentmem.blockpool.pool import Pool
from agentmem.compose.composer import EXACT, Composition, Span
from agentmem.compose.ledger import Pair
from agentmem.compose.planners import Read
from agentmem.compose.rotation import Rotation
from agentmem.engine.admission import Admission
from agentmem.engine.capture import Capture
from agentmem.engine.course import Course
from agentmem.engine.table import Table
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.quant.attention import Path

FOLLOWING = 8
"""Tokens that are predicted: the first, and those behind what the dense run says."""
CHUNK = 128
"""Tokens of a pass at most: who comes meanwhile waits for one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to try, of one agent."""

    namespace: str
    agent: str
    ids: list[int]
    spans: list[Span]


class Bench:
    """What trials run on. Engine thread only."""

    def __init__(
        self, model: LoadedModel, network: Network, pool: Pool, path: Path, admission: Admission
    ) -> None:  # fmt: skip
        self.model, self.network, self.pool, self.path, self.admission = model, network, pool, path, admission

    def has_room(self, tokens: int) -> bool:
        """Whether two tables of so many tokens fit, in slots that nobody has to leave."""
        free = 2 * self.pool.geometry.worst_slots(tokens + FOLLOWING) <= self.pool.slots.free
        return free and self.admission.fits([tokens + FOLLOWING] * 2, tokens)

    def read(self, table: Table, tokens: Sequence[int]) -> np.ndarray:
        """Run the model over the next tokens; the logarithms of what it predicts behind the last one, float32 [vocab]."""
        views = table.views()
        logits = self.network.logits(mx.array([list(tokens)]), views, [len(tokens) - 1])[0].astype(mx.float32)
        arrays, apply = table.absorb(views, list(tokens))
        predicted = logits - mx.logsumexp(logits)
        mx.eval(arrays, predicted)
        apply()
        return np.array(predicted)


class Trial:
    """Compares a prompt made as `composition` says with the prompt read whole. `pair` is there in the end, and what the dense run
    computed. Precondition: the composition begins with the prompt's first token.
    """

    def __init__(
        self, bench: Bench, rotations: list[Rotation], prompt: Prompt, composition: Composition
    ) -> None:
        self.prompt, self.composition = prompt, composition
        self.pair: Pair | None = None
        self.capture: Capture | None = None
        self._bench, self._rotations = bench, rotations
        self._tables: list[Table] = []
        self._passes = self._run()

    def advance(self) -> bool:
        """One more pass; False when it is over. Raises Overloaded without slots, and what the model raises."""
        return next(self._passes, None) is not None

    def end(self) -> None:
        """Give everything back, wherever it stands."""
        self._passes.close()
        for table in self._tables:
            table.release()
        self._tables = []

    def _run(self) -> Generator[bool]:
        ids, ends = self.prompt.ids, self._bench.model.tokenizer.eos_ids
        dense, first = yield from self._made(Course([Read(tuple(ids))], 0, EXACT), keeps=True)
        wanted, said = [first], list[int]()
        while len(wanted) < FOLLOWING and (token := int(np.argmax(wanted[-1]))) not in ends:
            said.append(token)
            wanted.append(self._bench.read(dense, [token]))
            yield True
        course = Course(self.composition.steps, 0, self.composition.provenance)
        table, first = yield from self._made(course, keeps=False)
        got = [first]
        for token in said:
            got.append(self._bench.read(table, [token]))
            yield True
        self.pair = _pair(wanted, got)
        self.capture = Capture(dense, self._rotations)

    def _made(self, course: Course, keeps: bool) -> Generator[bool, None, tuple[Table, np.ndarray]]:
        """Follow a course to its end: a table, and what is predicted behind it."""
        bench = self._bench
        table = Table(bench.pool, bench.path)
        self._tables.append(table)
        table.keeps = keeps
        predicted = np.zeros(0, np.float32)
        while len(table) < course.end:
            if not course.put(table, self._rotations, bench.network, bench.model.dtype):
                yield True
                continue
            stop = min(course.read_until(len(table)), len(table) + CHUNK)
            predicted = bench.read(table, self.prompt.ids[len(table) : stop])
            yield True
        return table, predicted


def _pair(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> Pair:
    """Logarithms of probabilities [vocab] each."""
    kl = [
        float((np.exp(p) * (p - q)).sum())
        for p, q in ((p.astype(np.float64), q.astype(np.float64)) for p, q in zip(wanted, got, strict=True))
    ]
    same = [int(p.argmax() == q.argmax()) for p, q in zip(wanted, got, strict=True)]
    return Pair(sum(kl) / len(kl), kl[0], sum(same) / len(same))

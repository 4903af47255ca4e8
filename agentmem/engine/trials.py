"""Trials in idle time: audits of composed prompts, and the calibration that `auto` asks for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from agentmem.compose.composer import EXACT, Composer, Policy
from agentmem.compose.ledger import Key, Pair
from agentmem.compose.rotation import Rotation
from agentmem.engine.trial import Bench, Prompt, Trial

log = logging.getLogger(__name__)

AUDITS = 8
"""Composed prompts that wait for their audit at most."""
PAIRS = 24
"""Prompts of a template that it is calibrated on at most."""


Case = tuple[Prompt, frozenset[bytes]]
"""A prompt, and what anchors call its texts."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and what becomes of its trial: `done(None)` where there was none. own: with anchors of its own texts."""

    prompt: Prompt
    planner: str
    done: Callable[[Trial | None], None]
    own: bool = True
    texts: frozenset[bytes] = frozenset()


class Trials:
    """Engine thread only. One trial runs at a time, a pass in each step in which nobody else is there."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._jobs: deque[Job] = deque()
        self._running: tuple[Job, Trial] | None = None

    @property
    def running(self) -> bool:
        return self._running is not None

    def advance(self, composer: Composer, rotations: list[Rotation]) -> bool:
        """Go on with what is to be tried; returns whether there was anything."""
        if self._running is None and not self._begin(composer, rotations):
            return False
        if self._running is None:
            return True
        job, trial = self._running
        try:
            if trial.advance():
                return True
        except Exception:
            log.exception("a composed prompt could not be compared with a dense one")
        self._running = None
        trial.end()
        job.done(trial if trial.pair is not None else None)
        return True

    def let_go(self) -> None:
        """Somebody has come: give back what the trial holds. It begins anew later."""
        if self._running is not None:
            job, trial = self._running
            trial.end()
            self._running = None
            self._jobs.appendleft(job)

    def drop(self, wanted: Callable[[Prompt], bool] = lambda prompt: True) -> None:
        """Leave out what is to be tried, all of it or of some prompts."""
        self.let_go()
        while gone := [job for job in self._jobs if wanted(job.prompt)]:
            self._jobs = deque(job for job in self._jobs if job not in gone)
            for job in gone:
                job.done(None)

    def _begin(self, composer: Composer, rotations: list[Rotation]) -> bool:
        if not self._jobs:
            return False
        job = self._jobs.popleft()
        p, how = job.prompt, Policy("composed", job.planner)
        apart = nullcontext() if job.own else composer.library.pool.without(job.texts)
        made = None
        if self._bench.has_room(len(p.ids)):
            with apart:
                made = composer.plan(p.namespace, p.ids, p.spans, 0, how, p.agent)
        if made is None:
            job.done(None)
        else:
            self._running = job, Trial(self._bench, rotations, p, made)
        return True

    def audit(self, composer: Composer, prompt: Prompt, planner: str) -> None:
        """Measure a composed prompt against a dense one, and learn from that; enough bad ones demote the template."""
        if len(self._jobs) >= AUDITS:
            return

        def done(trial: Trial | None) -> None:
            if trial is None or trial.pair is None or trial.capture is None:
                return
            made, pair = trial.composition, trial.pair
            log.info("audit of template %s: KL %.4f, top-1 %.2f", made.template.hex()[:8], pair.kl, pair.top1)
            composer.ledger.audit(prompt.namespace, made.template, made.planner, pair.kl)
            composer.learn(
                prompt.namespace, prompt.ids, prompt.spans, trial.capture.state, EXACT, prompt.agent
            )

        self._jobs.append(Job(prompt, planner, done))

    def calibrate(
        self, composer: Composer, namespace: str | None, planner: str, done: Callable[[list[dict[str, Any]]], None]
    ) -> None:  # fmt: skip
        """Try the last prompts of every template, each without the anchors of its own texts; `done` hears what was found."""
        keys = [key for key in composer.ledger.entries if namespace in (None, key[0])]
        rows = list[dict[str, Any]]()

        def go_on() -> None:
            while keys:
                key = keys.pop(0)
                jobs = self._cases(composer, key)
                if jobs:
                    self._calibrate(composer, key, planner, jobs, found)
                    return
                rows.append(_row(composer, key, planner, []))
            done(rows)

        def found(row: dict[str, Any]) -> None:
            rows.append(row)
            go_on()

        go_on()

    def _calibrate(
        self, composer: Composer, key: Key, planner: str, cases: list[Case], done: Callable[[dict[str, Any]], None]
    ) -> None:  # fmt: skip
        pairs, left = list[Pair](), len(cases)

        def one(trial: Trial | None) -> None:
            nonlocal left
            left -= 1
            if trial is not None and trial.pair is not None and trial.composition.planner == planner:
                pairs.append(trial.pair)
            if left:
                return
            if pairs and key in composer.ledger.entries:
                composer.ledger.calibrate(*key, planner, pairs)
            done(_row(composer, key, planner, pairs))

        self._jobs += [Job(prompt, planner, one, own=False, texts=texts) for prompt, texts in cases]

    @staticmethod
    def _cases(composer: Composer, key: Key) -> list[Case]:
        """The last prompts of a template."""
        found = []
        for case in composer.ledger.cases(*key)[-PAIRS:]:
            rebuilt = composer.rebuilt(*key, case)
            if rebuilt is None:
                continue
            segments = [s for text in case if (s := composer.library.segment(key[0], text)) is not None]
            # A trial counts as a prompt of somebody who has all of its texts anyway: nobody comes to own more.
            owners = composer.ledger.entries[key].owners.intersection(*(s.owners for s in segments))
            if owners:
                texts = frozenset[bytes]().union(
                    *(composer.library.made_of(key[0], s.text) for s in segments)
                )
                found.append((Prompt(key[0], min(owners), *rebuilt), texts))
        return found


def _row(composer: Composer, key: Key, planner: str, pairs: list[Pair]) -> dict[str, Any]:
    """What was found of one template; `verdict` is why `auto` may not compose it, or "holds"."""
    n, entry = len(pairs), composer.ledger.entries.get(key)

    def mean(name: str) -> float | None:
        return sum(getattr(p, name) for p in pairs) / n if n else None

    return {
        "namespace": key[0],
        "template": key[1].hex(),
        "agents": sorted(entry.owners) if entry is not None else [],
        "planner": planner,
        "pairs": n,
        "kl": mean("kl"),
        "first_kl": mean("first_kl"),
        "top1": mean("top1"),
        "verdict": composer.ledger.why_not(*key, planner) or "holds",
    }

"""The engine: one thread that owns MLX and steps all running sequences. `step` = plan -> run -> settle."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.background import Background, others
from agentmem.engine.carry import Carry
from agentmem.engine.checkpoints import Checkpoints
from agentmem.engine.composing import Composing
from agentmem.engine.draw import Chosen
from agentmem.engine.episodes import Episodes
from agentmem.engine.followers import Followers
from agentmem.engine.lobby import Lobby
from agentmem.engine.memory import Memory
from agentmem.engine.passes import Outcome, Passes
from agentmem.engine.planner import Planner
from agentmem.engine.prefetch import Prefetch
from agentmem.engine.recall import Recall
from agentmem.engine.reply import Reply
from agentmem.engine.request import Failed
from agentmem.engine.returns import Returns
from agentmem.engine.runner import Runner, Work
from agentmem.engine.scheduler import Scheduler
from agentmem.engine.sequence import Finish, Sequence
from agentmem.engine.stream import Stream
from agentmem.engine.table import Table
from agentmem.errors import AgentMemError, Overloaded, StoreError, reported
from agentmem.quant.attention import Path

log = logging.getLogger(__name__)

LOOKAHEAD = 4
"""How many requests that do not fit yet are looked at before the others wait too."""

IDLE_S, RETRY_S = 1.0, 0.01
"""How long the engine sleeps when nothing wakes it: with nothing to do, and while somebody waits for slots."""


class Engine:
    """Runs sequences. Other threads use `submit` and `call` only; everything else happens on the engine thread.

    A failing sequence fails alone: its slots are released and the others go on.
    """

    def __init__(
        self, runner: Runner, memory: Memory, pool: Pool, store: Store, recall: Recall, planner: Planner, path: Path,
        scheduler: Scheduler[Sequence], lobby: Lobby, composing: Composing, episodes: Episodes, *,
        max_batch: int, wait_for_commit: bool, plain: bool = True, checkpoints: Checkpoints | None = None,
    ) -> None:  # fmt: skip
        self.plain, self.checkpoints = plain, checkpoints
        self.runner, self.model = runner, runner.model
        self.memory, self.pool, self.store, self.planner = memory, pool, store, planner
        self.recall = recall
        self.prefetch = Prefetch(pool, memory, recall, episodes.foreseen)
        self.scheduler, self.pace, self.lobby, self.composing = scheduler, scheduler.pace, lobby, composing
        self.episodes, self.folds = episodes, episodes.folds
        self.followers = Followers(pool.geometry.page_tokens)
        self.background = Background(planner, episodes.folds)
        self.returns = Returns(self, planner, memory)
        self.passes = Passes(runner, scheduler.pace, self._fail, self.retry_or_fail)
        self.path = path
        self.max_batch, self.wait_for_commit = max_batch, wait_for_commit
        self.active: list[Sequence] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._again: list[Callable[[], None]] = []
        self._wake = threading.Event()
        self._closing = False

    @property
    def waiting(self) -> list[Sequence]:
        """Requests that are not admitted yet."""
        return self.lobby.waiting

    def wake(self) -> None:
        """There is something to do; safe from any thread."""
        self._wake.set()

    def submit(self, sequence: Sequence) -> None:
        """Queue a request; raises Overloaded when the queue is full, or too slow. Any thread."""
        self._open()
        if not sequence.background:
            self.lobby.check(self._inbox.qsize(), others(list(self.active)))
        self._inbox.put(lambda: self.lobby.add(sequence))
        self.wake()

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` on the engine thread between steps. Any thread; raises StoreError when the engine has stopped."""
        self._open()
        self._inbox.put(job)
        self.wake()

    def _open(self) -> None:
        if self._closing:
            raise StoreError("the engine has stopped; see the daemon's log and start it again")

    def close(self) -> None:
        """Stop after the current step; running replies end as cancelled and are kept. Any thread."""
        self._closing = True
        self.wake()

    def loop(self) -> None:
        """Body of the engine thread."""
        while not self._closing:
            if not self.step():
                self._check()
                self._wake.wait(timeout=RETRY_S if self._again else IDLE_S)
            self._wake.clear()
        self._drain()  # who posted something before the end waits for it
        for sequence in [*self.active, *self.waiting]:
            sequence.ticket.cancel()
        deadline = time.monotonic() + 30
        while (self.active or self.waiting or self.memory.unwritten) and time.monotonic() < deadline:
            if not self.step():
                self._wake.wait(timeout=0.05)
            self._wake.clear()

    def _check(self) -> None:
        """Integrity of the pool, when nothing holds slots on its own account."""
        if self.active or self.waiting or self.recall.running or self.memory.unwritten:
            return
        try:
            self.pool.check()
        except AssertionError:
            log.exception("integrity check failed")

    def fail_all(self, error: AgentMemError) -> None:
        """The engine cannot go on: every request fails, nothing more is accepted."""
        self._closing = True
        for sequence in [*self.active, *self.waiting]:
            if sequence.first is None:
                sequence.sink(Failed(error))
        self.active, self.lobby.waiting = [], []

    def step(self) -> bool:
        """One step of every running sequence; returns whether anything was done."""
        drained = self._drain() | self.pool.arena.advance()
        if self.active or self.waiting:
            self.composing.let_go()
        start = time.perf_counter()
        work = self.plan()
        outcomes = self.run(work)
        self.returns.land()
        self.settle(outcomes)
        if work.decoding and outcomes:
            self.pace.stepped(1e3 * (time.perf_counter() - start))
        rested = not self.active and self.composing.rest(alone=not self.waiting)
        if self.folds.urgent or not (rested or self.active or self.waiting):
            rested |= self.folds.rest()
        return drained or rested or bool(outcomes) or (bool(work.decoding or work.chunks) and not self._again)

    def _drain(self) -> bool:
        """Run what was posted, what the store has completed, and what waits for slots, each once."""
        done = False
        for box in (self._inbox, self.store.completions):
            for _ in range(box.qsize()):
                box.get_nowait()()
                done = True
        again, self._again = self._again, []
        for job in again:
            job()
        return done or len(self._again) < len(again)

    def plan(self) -> Work:
        """Admit what can start, end what was cancelled, and choose the tokens that each sequence is fed in this step."""
        for sequence in [s for s in self.active if s.ticket.cancelled and s.phase in ("prefill", "decode")]:
            if self._closing or not sequence.only_read():
                self._finish(sequence, "cancelled")
        self._admit()
        for sequence in self.background.leaving(self.active, self.waiting):
            self._finish(sequence, "cancelled")
        self.returns.begin_stream()
        may = self.followers.ready(self.background.running(self.active))
        ready = [s for s in may if s.course is None or self._put(s)]
        for sequence in ready:
            self.planner.announce(sequence)
        step = self.scheduler.plan([s for s in self.active if s.phase in ("decode", "closing")], ready)
        return Work(step.decode, [(s, s.next_chunk(n)) for s, n in step.prefill])

    def _put(self, sequence: Sequence) -> bool:
        """Put what is next in a composed prompt; whether it can go on, for which it needs slots."""
        try:
            if not self.composing.put(sequence):
                self.wake()
                return False
        except Overloaded as error:
            self.retry_or_fail(sequence, error, lambda: None)
            return False
        except Exception as error:
            self._fail(sequence, reported(error))
            return False
        return True

    def _admit(self) -> None:
        """Start what can start, in the lobby's order. One that must be next keeps the others waiting until it fits."""
        for sequence in [s for s in self.waiting if s.ticket.cancelled]:
            self.waiting.remove(sequence)
            sequence.finish, sequence.phase = "cancelled", "done"
            self.planner.drop(sequence)
            self._report(sequence, 0, False)
        self.lobby.waiting = [s for s in self.waiting if s.phase != "done"]
        misfits = 0
        ordered = self.lobby.ordered(self.background.waiting(self.active, self.waiting))
        for sequence in ordered:
            if self.active and sum(s.width for s in [*self.active, sequence]) > self.max_batch:
                break
            try:
                self.composing.check(sequence.request.planner)
                admitted = self.planner.admit(sequence, self.active)
            except Exception as error:
                self.waiting.remove(sequence)
                self._fail(sequence, reported(error))
                continue
            if admitted:
                part = self.planner.stretch(sequence)
                if part is None:
                    self.lobby.admitted(sequence)
                self.active.append(part or sequence)
                self.prefetch.release(sequence)
                self.returns.restore(part or sequence)
                continue
            misfits += 1
            if misfits == LOOKAHEAD or self.lobby.must_be_next(sequence):
                break
        still = [s for s in ordered if s in self.waiting]
        self.prefetch.advance(still, self.planner.need, self.planner.room(self.active))

    def retry_or_fail(self, sequence: Sequence, error: AgentMemError, again: Callable[[], None]) -> None:
        """Slots are missing: they come free when a write or another sequence ends; without either the request fails."""
        others = [s for s in self.active if s is not sequence and s.phase not in ("ended", "done")]
        if self.prefetch.release_all() or self.memory.unwritten or others or self.recall.running:
            self._again.append(again)
        else:
            self._fail(sequence, error)

    def start(self, sequence: Sequence, stream: Stream | None = None) -> None:
        """The matched pages have slots: begin with the prefill. Their rows are there, or come with the stream."""
        assert sequence.match is not None
        if sequence.phase == "done":
            return
        table, past = Table(self.pool, self.path), sequence.past
        if past.shown is not None:
            table.show(past.shown)
        table.load(past.newer, sequence.reused - (past.shown.tokens if past.shown is not None else 0))
        table.stream = stream
        sequence.table = table
        if self.checkpoints is not None:
            table.carry = Carry(self.checkpoints.baggage)
            if past.checkpoint is not None:
                self.checkpoints.load(past.checkpoint, table.carry)
        self.planner.unpin(sequence)
        self.composing.plan(sequence)
        sequence.phase = "prefill"
        if sequence.prompt_done:
            self.planner.announce(sequence)
            self._finish(sequence, "stop")

    def run(self, work: Work) -> list[Outcome]:
        """One forward pass for all that decode, and one for the chunks of prompts; the tokens that were sampled."""
        return self.passes.run(work)

    def settle(self, outcomes: list[Outcome]) -> None:
        """Stream new text; end the sequences that are complete."""
        for sequence, chosen in outcomes:
            if sequence.phase == "done":
                continue
            if sequence.phase == "closing":
                self._end(sequence)
            elif chosen:
                self._fork(sequence, len(chosen))
                for one, choice in zip((sequence, *sequence.others), chosen, strict=False):
                    self._take_token(one, choice)
            elif not sequence.generate and sequence.prompt_done:
                self._finish(sequence, "cancelled" if sequence.ticket.cancelled else "stop")
        self.active = [s for s in self.active if s.phase != "done"]

    def _fork(self, sequence: Sequence, n: int) -> None:
        """The prompt is run: from here on each of its `n` replies goes its own way."""
        for _ in range(1, n):
            reply = Reply(self.model.tokenizer.detokenizer(), sequence.request.stop)
            self.active.append(sequence.fork(reply))

    def _take_token(self, sequence: Sequence, chosen: Chosen) -> None:
        if sequence.phase == "prefill":
            sequence.phase = "decode"
            sequence.ttft_ms = 1e3 * (time.perf_counter() - sequence.submitted)
            if sequence.course is None:  # what a composed prompt takes is no measure of reading
                self.pace.prompt_read(len(sequence.ids) - sequence.reused, sequence.prefill_ms)
        finish = sequence.take(chosen.token, chosen.logprob, self.model.tokenizer.eos_ids)
        if finish is not None:
            self._finish(sequence, finish)

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        """The reply is over. The request is when all its replies are; the first of them is kept."""
        sequence.finish = finish
        sequence.show_rest()
        sequence.phase = "ended"
        if sequence.first is not None:
            self._leave(sequence)
        whole = sequence.whole
        if whole.phase == "ended" and all(s.phase == "done" for s in whole.others):
            self._close(whole)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence of which nothing is kept gives everything back."""
        sequence.phase = "done"
        for table in (sequence.table, sequence.prefix):
            if table is not None:
                table.release()
        if sequence in self.active:
            self.active.remove(sequence)

    def _close(self, sequence: Sequence) -> None:
        """The table keeps exactly the tokens of the reply. The last one is fed once more where it has no state yet."""
        reply, table = sequence.reply, sequence.table
        assert table is not None
        if reply is not None:
            kept = len(sequence.ids) + reply.kept()
            if len(table) > kept:
                table.cut(kept)
            elif len(table) == kept - 1 and reply.tokens:
                sequence.phase = "closing"
                return
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Turn the table into pages, of a composed one only its exact prefix; log the turn, and report once it is committed."""
        table = sequence.table
        exact = sequence.prefix if sequence.prefix is not None else table
        assert table is not None
        assert exact is not None
        assert sequence.agent is not None
        assert sequence.session is not None
        self.composing.gather(sequence)
        fed, carry = len(table), table.carry
        try:
            root = self.pool.tree(sequence.agent.row.space).root
            last = exact.settle(root)
        except Overloaded as error:
            sequence.phase = "restoring"
            self.retry_or_fail(sequence, error, lambda: self._end(sequence))
            return
        if table is not exact:
            table.release()
        head = last if last is not root else None
        turn = self.planner.record(sequence, fed)
        sequence.phase = "done"
        if not sequence.background:
            self.pace.turn_ended(1e3 * (time.perf_counter() - sequence.planned))
        sequence.session.busy = False
        if sequence in self.active:
            self.active.remove(sequence)

        agent, session = sequence.agent, sequence.session
        if self.plain:
            self.folds.due(agent, session)

        waits = self.wait_for_commit
        parts: list[tuple[int, Exception | None]] = []
        checkpoint = carry is not None and head is not None

        def committed(written: int, error: Exception | None) -> None:
            parts.append((written, error))
            if waits and len(parts) == 1 + checkpoint:
                sound = all(error is None for _, error in parts)
                self._report(sequence, sum(written for written, _ in parts), sound and agent.persist)

        self.memory.finish(agent, session, turn, head, committed)
        if carry is not None and head is not None and self.checkpoints is not None:
            self.checkpoints.keep(agent, session, head, carry, committed)
        if not waits:
            self._report(sequence, 0, False)

    def _report(self, sequence: Sequence, written: int, committed: bool) -> None:
        sequence.reported = True
        sequence.sink(sequence.finished(written, committed))

    def _fail(self, sequence: Sequence, error: AgentMemError) -> None:
        """Release everything of a request, all its replies, and report the error."""
        whole = sequence.whole
        if whole.phase == "done":
            return
        for one in (*whole.others, whole):
            if one.phase != "done":
                self._leave(one)
        self.planner.drop(whole)
        whole.reported = True
        whole.sink(Failed(error))

"""Jobs: transcripts that are read in the background, one after the other, across restarts."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Literal

from agentmem.engine.engine import Engine
from agentmem.engine.fetch import Call
from agentmem.engine.job import Drawer, Job, JobInfo, State
from agentmem.engine.memory import Memory
from agentmem.engine.request import ChatRequest, Event, Failed, Finished, Ticket
from agentmem.engine.sequence import Sequence
from agentmem.errors import BadRequest, ConversationBusy, NotFound, Overloaded, StoreError

log = logging.getLogger(__name__)

MOST_UNDONE, MOST_ENDED, ENDED_DAYS = 64, 100, 7
RETRY_S, RETRIES = 1.0, 60
"""How often in a row a job is tried again that finds no room."""
LEAVE_S = 60.0
POLL_S = 0.05
NOT_WRITTEN = "all of it was read, and the disk did not take the end of it; that is written with the next turn of the session"

Found = Literal["part", "writing", "read", "lost"]


class Jobs:
    """A thread reads the oldest job that has not ended. Methods may be called from any thread but the engine's.

    A job's request is an ordinary one with the whole transcript. Its parts are committed turns, which are found again as any
    remembered prefix is: after a crash the same request goes on where the last of them ended. Its last turn bears the job's id,
    so that a job that was read, and not yet noted as done, is not read twice.
    """

    def __init__(self, call: Call, engine: Engine, memory: Memory, drawer: Drawer) -> None:
        self._call, self._engine, self._memory, self._drawer = call, engine, memory, drawer
        self._changed = threading.Condition()
        self._closing = False
        self._jobs = {job.id: job for job in sorted(drawer.kept(), key=lambda j: j.created)}
        self._sequence: Sequence | None = None
        self._tidy()
        self._thread = threading.Thread(target=self._main, name="jobs", daemon=True)
        self._thread.start()

    def add(self, request: ChatRequest) -> JobInfo:
        """Take a transcript in; it is on disk when this returns.

        Raises Overloaded for too many, StoreError, and BadRequest for an agent that leaves no readable text on disk.
        """
        self._call(lambda: self._check(request.namespace, request.agent))
        said = request.messages
        job = Job(request.agent, request.session, request.namespace, said, len(said))
        with self._changed:
            if sum(not j.ended for j in self._jobs.values()) >= MOST_UNDONE:
                raise Overloaded(f"{MOST_UNDONE} transcripts are waiting to be read already")
            self._jobs[job.id] = job
            try:
                self._drawer.keep(job)
            except OSError as error:
                del self._jobs[job.id]
                raise StoreError(f"the transcript could not be kept: {error}") from error
            self._changed.notify_all()
        return job.info()

    def all(self, namespace: str = "default") -> list[JobInfo]:
        """All jobs of a namespace, the oldest first."""
        with self._changed:
            mine = [j for j in self._jobs.values() if j.namespace == namespace]
        return [self._told(job) for job in mine]

    def show(self, id_: str, namespace: str = "default") -> JobInfo:
        """One job. Raises NotFound."""
        return self._told(self._find(id_, namespace))

    def cancel(self, id_: str, namespace: str = "default") -> JobInfo:
        """End a job, and wait for that; what was read stays. One that has ended stays as it is. Raises NotFound."""
        job = self._find(id_, namespace)
        self._cancel([job])
        return job.info()

    def forget(self, namespace: str, agent: str, session: str | None = None) -> None:
        """Cancel the jobs of an agent, or of one of its sessions, and keep nothing of them."""
        with self._changed:
            mine = [
                j
                for j in self._jobs.values()
                if (j.namespace, j.agent) == (namespace, agent) and session in (None, j.session)
            ]
        self._cancel(mine)
        with self._changed:
            for job in mine:
                self._drop(job)

    def check_free(self, namespace: str, agent: str, session: str | None = None) -> None:
        """Raises ConversationBusy where a transcript is being read into the session, or any one of the agent's, or will be."""
        # Without the lock, which is held while files are written: this runs where sockets wait, too.
        for job in list(self._jobs.values()):
            mine = (job.namespace, job.agent) == (namespace, agent) and session in (None, job.session)
            if mine and not job.ended:
                raise ConversationBusy(
                    f"{job.id} reads a transcript into session {job.session!r} of agent {job.agent!r}; wait until it is "
                    f"done, cancel it, or use another {'agent' if session is None else 'session'}",
                    param="agent" if session is None else "session",
                )

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self._changed:
            found = Counter(j.state for j in self._jobs.values())
        return {state: found[state] for state in ("queued", "running", "done", "failed", "cancelled")}

    def close(self) -> None:
        """Read nothing more; what was begun goes on at the next start. Does not wait."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end. Precondition: `close` was called, and the engine has stopped."""
        self._thread.join(timeout=5)

    def _check(self, namespace: str, name: str) -> None:
        agent = self._memory.agent(namespace, name)
        sealed = agent.encrypted if agent is not None else self._memory.encrypt
        if sealed != "off" or (agent is not None and not agent.persist):
            raise BadRequest(
                f"agent {name!r} is encrypted, or kept off the disk, and a transcript waits there in plain text; append it "
                "without background",
                param="background",
            )

    def _find(self, id_: str, namespace: str) -> Job:
        with self._changed:
            job = self._jobs.get(id_)
        if job is None or job.namespace != namespace:
            raise NotFound(f"there is no job {id_[:80]!r}", param="job")
        return job

    def _cancel(self, jobs: list[Job]) -> None:
        with self._changed:
            for job in jobs:
                job.stop = True
                if job.state == "queued":
                    self._end(job, "cancelled")
                elif job.ticket is not None:
                    job.ticket.cancel()
            self._engine.wake()
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: all(j.ended for j in jobs) or self._closing, LEAVE_S):
                raise Overloaded("the job is still being read; try again")

    def _told(self, job: Job) -> JobInfo:
        if job.state == "running":
            self._call(lambda: self._look(job))
        return job.info()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next() is not None)
                job = self._next()
                if self._closing or job is None:
                    return
                job.state, job.updated = "running", time.time()
            try:
                self._run(job)
            except StoreError:  # the engine has stopped
                return
            except Exception as error:
                log.exception("%s failed", job.id)
                with self._changed:
                    self._end(job, "failed", f"the job failed: {error}")

    def _next(self) -> Job | None:
        return next((j for j in self._jobs.values() if j.state == "queued"), None)

    def _run(self, job: Job) -> None:
        """Read until all is in the session. Raises StoreError once the engine takes nothing more."""
        retries = 0
        while True:
            read = job.tokens_read
            found = self._call(lambda: self._look(job))
            retries = 0 if job.tokens_read > read else retries
            with self._changed:
                if self._closing:
                    return
                if found == "writing":
                    self._changed.wait_for(lambda: self._closing, POLL_S)
                    continue
                if found == "lost":
                    self._end(job, "failed", NOT_WRITTEN)
                elif found == "read" or job.stop:
                    self._end(job, "done" if found == "read" else "cancelled")
                if job.ended:
                    return
            event = self._read(job)
            if not isinstance(event, Failed):
                continue
            self._call(lambda: None)
            retries += 1
            if not isinstance(event.error, Overloaded) or retries > RETRIES:
                with self._changed:
                    self._end(job, "failed", event.error.message)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing or job.stop, RETRY_S)

    def _read(self, job: Job) -> Finished | Failed:
        """One request with all of the transcript; it may end before its end."""
        outcome: Future[Finished | Failed] = Future()

        def sink(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                outcome.set_result(event)

        ticket = Ticket()
        sequence = Sequence(job.request(), ticket, sink, generate=False)
        with self._changed:
            job.ticket, self._sequence = ticket, sequence
            if job.stop:
                ticket.cancel()
        self._engine.submit(sequence)
        return outcome.result()

    def _look(self, job: Job) -> Found:
        """On the engine thread: note how far a job is, and say whether all of it is in its session, and on disk."""
        agent = self._memory.agent(job.namespace, job.agent)
        session = agent.sessions.get(job.session) if agent is not None else None
        turns = [] if session is None else [t for t in session.row.turns if t.stats.get("job") == job.id]
        held = len(session.conversation.ids) if session is not None else 0
        before = turns[0].stats["session_tokens_before"] if turns else held
        at = max([held, *(s.history for s in self._engine.active if s.request.job == job.id)])
        sequence = self._sequence
        if sequence is not None and sequence.request.job == job.id and sequence.ids:
            job.tokens_total = max(len(sequence.ids) - before, job.tokens_total or 0)
        if at - before != job.tokens_read:
            job.tokens_read, job.updated = at - before, time.time()
        if session is None or all(t.stats.get("part") for t in turns):
            return "part"
        job.tokens_total = job.tokens_read
        if any(t is one for t in turns for one in session.unlogged):
            return "lost"
        return "writing" if self._memory.unwritten else "read"

    def _end(self, job: Job, state: State, error: str | None = None) -> None:
        """Precondition: the lock is held."""
        job.state, job.error, job.updated = state, error, time.time()
        job.said, job.ticket = [], None
        try:
            self._drawer.keep(job)
        except OSError:
            log.exception("the end of %s could not be noted; the next start looks at it again", job.id)
        self._tidy()
        self._changed.notify_all()

    def _tidy(self) -> None:
        """Jobs that ended long ago go, and the oldest of too many."""
        ended = sorted((j for j in self._jobs.values() if j.ended), key=lambda j: -j.updated)
        oldest = time.time() - 86400 * ENDED_DAYS
        for i, job in enumerate(ended):
            if i >= MOST_ENDED or job.updated < oldest:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        try:
            self._drawer.drop(job)
        except OSError:
            log.exception("the file of %s could not be deleted", job.id)

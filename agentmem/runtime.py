"""The runtime: model, store and engine of one home behind thread-safe methods. The HTTP layer calls only this."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from agentmem import __version__
from agentmem.blockpool.extent import FORMAT_VERSION
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine import seam
from agentmem.engine.engine import Engine
from agentmem.engine.memory import Agent, Memory
from agentmem.engine.planner import Planner
from agentmem.engine.request import AgentInfo, ChatRequest, Event, Failed, Finished, State, Ticket
from agentmem.engine.sequence import Sequence
from agentmem.engine.transfer import Transfer
from agentmem.errors import AgentMemError, ModelUnavailable, NotFound, Overloaded, StoreError
from agentmem.model.identity import text_identity
from agentmem.model.loaded import LoadedModel, Progress, load
from agentmem.quant import blas
from agentmem.quant.device import backend, leave_thread
from agentmem.quant.format import KVFormat, kv_format, stored_dtype
from agentmem.quant.paths import chosen
from agentmem.quant.rows import RowCodec
from agentmem.quant.selftest import self_test
from agentmem.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_SECONDS = 60.0


def fingerprint(identity: dict[str, str], format: KVFormat, geometry: Geometry) -> str:
    """SHA-256 over everything that decides what a stored row means: model, tokenizer, template, format, page size, version."""
    parts = {
        "model": identity,
        "format": format.identity(),
        "layers": [
            [c.shape.heads, c.shape.key_dim, c.shape.value_dim, str(c.format.identity())]
            for c in geometry.codecs
        ],
        "stored": str(geometry.codecs[0].stored),
        "page_tokens": geometry.page_tokens,
        "version": FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Runtime:
    """Everything one daemon serves from. Make it with `open`; all methods may be called from any thread."""

    model_name: str
    max_context: int

    def __init__(
        self, settings: Settings, model: Callable[[], LoadedModel] | None, progress: Progress | None
    ) -> None:
        self._settings = settings
        self._make_model = model or (lambda: load(settings.model, settings.home, progress))
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._started = time.time()

    @classmethod
    def open(
        cls,
        settings: Settings,
        model: Callable[[], LoadedModel] | None = None,
        progress: Progress | None = None,
    ) -> Runtime:
        """Load the model on the engine thread, open the store, start the engine. `progress` hears of downloads and conversions.

        Precondition: the caller holds the home's lock. Raises ModelUnavailable or StoreError.
        """
        settings.paths.prepare()
        runtime = cls(settings, model, progress)
        runtime._thread.start()
        runtime._ready.result()
        return runtime

    def _main(self) -> None:
        try:
            self._serve()
        finally:
            leave_thread()

    def _serve(self) -> None:
        try:
            self._build()
        except AgentMemError as error:
            self._ready.set_exception(error)
            return
        except Exception as error:
            log.exception("start failed")
            self._ready.set_exception(StoreError(f"start failed: {error}"))
            return
        self._ready.set_result(None)
        try:
            self._engine.loop()
        except Exception as error:
            log.exception("the engine stopped")
            self._engine.fail_all(AgentMemError(f"the engine stopped: {error}"))
        self._store.close()

    def _build(self) -> None:
        """On the engine thread: model, self-test, pool, store, memory, engine."""
        settings, model = self._settings, self._make_model()
        self.model_name = model.name
        self.max_context = min(settings.max_context or model.max_context, model.max_context)
        seam.install(model.model)
        shapes, query_heads, dtype = seam.probe(model.model)
        try:
            format = kv_format(settings.kv_format)
            codecs = tuple(RowCodec(s, format.for_shape(s), stored_dtype(dtype)) for s in shapes)
            geometry = Geometry(codecs, settings.page_tokens)
            self._fingerprint = fingerprint(model.identity, format, geometry)
            self._pool = Pool(geometry, int(settings.ram_budget), self._fingerprint)
        except ValueError as error:
            raise ModelUnavailable(str(error)) from error
        self._self_test = self_test(format, shapes[0], query_heads, dtype, stored_dtype(dtype))
        self._store = Store(
            settings.paths.store,
            self._fingerprint,
            text_identity(model.identity),
            durable=settings.commit != "none",
            wake=lambda: self._engine.wake(),
        )
        self._memory = Memory(self._store, self._pool, model.tokenizer)
        self._memory.load()
        planner = Planner(
            self._memory,
            self._pool,
            model.tokenizer,
            max_context=self.max_context,
            max_reply=settings.max_reply,
        )
        self._engine = Engine(
            model, self._memory, self._pool, self._store, planner, chosen(self._self_test),
            chunk_tokens=settings.chunk_tokens, queue_limit=settings.queue_limit, wait_for_commit=settings.commit == "full",
        )  # fmt: skip
        recall = self._engine.recall
        self.transfer = Transfer(self._call, self._when_idle, self._memory, recall, model, self._fingerprint)

    def close(self) -> None:
        """End running replies (they are kept), finish writing, stop the engine."""
        self._engine.close()
        self._thread.join()

    @property
    def geometry(self) -> Geometry:
        """How rows lie in slots."""
        return self._pool.geometry

    def chat(self, request: ChatRequest, sink: Callable[[Event], None]) -> Ticket:
        """Run one turn. Events reach `sink` from other threads, in order: Started, Delta*, then Finished or Failed.

        Raises Overloaded at once when the queue is full.
        """
        sequence = Sequence(request, Ticket(), sink)
        self._engine.submit(sequence)
        return sequence.ticket

    def append(self, request: ChatRequest) -> dict[str, Any]:
        """Add messages to the agent's session without generating; returns the usage object. Raises what the turn raised."""
        outcome: Future[dict[str, Any]] = Future()

        def sink(event: Event) -> None:
            if isinstance(event, Finished):
                outcome.set_result(event.usage)
            elif isinstance(event, Failed):
                outcome.set_exception(event.error)

        request.history = "server"
        self._engine.submit(Sequence(request, Ticket(), sink, generate=False))
        return outcome.result()

    def agents(self, namespace: str = "default") -> list[AgentInfo]:
        """All agents of a namespace, by name."""
        return self._call(lambda: [self._info(a) for a in self._memory.agents(namespace)])

    def agent(self, name: str, namespace: str = "default") -> AgentInfo:
        """One agent; raises NotFound."""
        return self._call(lambda: self._info(self._find(namespace, name)))

    def warm(self, name: str, namespace: str = "default") -> AgentInfo:
        """Bring an agent's pages from disk into RAM. Raises NotFound, or Overloaded when they do not fit."""
        done: Future[AgentInfo] = Future()

        def start() -> None:
            agent = self._find(namespace, name)
            pages = [p for p in _chain_pages(agent) if p.slots is None and p.pieces is not None]
            self._pool.pin(pages)

            def finish(bad: dict[int, str], _: float) -> None:
                self._pool.unpin(pages)
                if bad:
                    self._memory.lose(bad)
                done.set_result(self._info(agent))

            try:
                self._engine.recall.start(pages, finish)
            except AgentMemError:
                self._pool.unpin(pages)
                raise

        self._call(start)
        return done.result()

    def evict(self, name: str, namespace: str = "default") -> AgentInfo:
        """Take an agent's pages out of RAM, those that other agents use excepted. Waits for running turns; raises NotFound."""

        def evict() -> AgentInfo:
            agent = self._find(namespace, name)
            others = {p for a in self._memory.agents() if a is not agent for p in _chain_pages(a)}
            for page in _chain_pages(agent):
                if (
                    page.slots is not None
                    and page.pieces is not None
                    and not page.pins
                    and page not in others
                ):
                    self._pool.evict(page)
            return self._info(agent)

        return self._when_idle(namespace, name, evict)

    def forget(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """Delete an agent: token log, index rows, and the bytes that only it uses. Irreversible. Raises NotFound."""
        done: Future[dict[str, Any]] = Future()

        def forget() -> None:
            def finish(freed: int, error: Exception | None) -> None:
                if error is not None:
                    done.set_exception(StoreError(f"agent {name!r} could not be deleted from disk: {error}"))
                else:
                    done.set_result({"agent": name, "bytes_freed": freed})

            self._memory.forget(self._find(namespace, name), finish)

        self._when_idle(namespace, name, forget)
        return done.result()

    def explain(self, name: str, session: str | None = None, namespace: str = "default") -> dict[str, Any]:
        """Why the last turn was or was not reused. Raises NotFound."""

        def explain() -> dict[str, Any]:
            sessions = self._find(namespace, name).sessions
            wanted = (
                [sessions[session]] if session in sessions else [] if session else list(sessions.values())
            )
            last = max((t for s in wanted for t in s.row.turns), key=lambda t: t.created, default=None)
            if last is None:
                raise NotFound(f"agent {name!r} has no turn in session {session!r}")
            return {"agent": name, "turn": last.n, "created": last.created, **last.stats}

        return self._call(explain)

    def health(self) -> dict[str, Any]:
        """What `doctor` and `/health` show."""
        status = self._store.status()
        return {
            "status": "degraded" if status["read_only"] else "ok",
            "version": __version__,
            "model": self.model_name,
            "max_context": self.max_context,
            "backend": backend(),
            "blas": blas.status(),
            "self_test": self._self_test,
            "kv_format": self._settings.kv_format,
            "fingerprint": self._fingerprint,
            "commit": self._settings.commit,
            "uptime_s": time.time() - self._started,
            "waiting": len(self._engine.waiting),
            "active": len(self._engine.active),
            "store": status,
        }

    def store(self) -> dict[str, Any]:
        """Budgets and bytes of RAM and disk."""
        pool = self._pool
        return {
            "ram": {
                "budget_bytes": int(self._settings.ram_budget),
                "capacity_bytes": pool.capacity_bytes,
                "used_bytes": pool.used_bytes,
                "slot_bytes": pool.geometry.slot_bytes,
                "evictions": pool.evictions,
            },
            "disk": self._store.status(),
            "row_bytes": {"packed": pool.geometry.packed_row_bytes, "fp16": pool.geometry.raw_row_bytes},
            "page_tokens": pool.geometry.page_tokens,
        }

    def _find(self, namespace: str, name: str) -> Agent:
        agent = self._memory.agent(namespace, name)
        if agent is None:
            raise NotFound(
                f"no agent {name!r} in namespace {namespace!r}; `agentmem agents` lists them", param="agent"
            )
        return agent

    def _call(self, job: Callable[[], T]) -> T:
        """Run `job` on the engine thread and wait for its result."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(job())
            except BaseException as error:
                outcome.set_exception(error)

        self._engine.post(run)
        return outcome.result()

    def _when_idle(self, namespace: str, name: str, job: Callable[[], T]) -> T:
        """Run `job` on the engine thread once the agent is not speaking and no turn waits to be written."""
        deadline = time.monotonic() + BUSY_SECONDS
        pending = object()

        def attempt() -> T | object:
            agent = self._find(namespace, name)
            if self._memory.unwritten or any(s.busy for s in agent.sessions.values()):
                return pending
            return job()

        while (result := self._call(attempt)) is pending:
            if time.monotonic() > deadline:
                raise Overloaded(f"agent {name!r} is still speaking; try again when its reply is over")
            time.sleep(0.02)
        return result  # type: ignore[return-value]

    def _info(self, agent: Agent) -> AgentInfo:
        pages = _chain_pages(agent)
        g, totals, rate = self._pool.geometry, agent.row.totals, self._engine.prefill_rate
        slots = {s for p in pages for s in p.slots or ()}
        cached = int(totals.get("cached_tokens", 0))
        return AgentInfo(
            agent=agent.row.name,
            namespace=agent.row.namespace,
            model=self.model_name,
            state=_state(pages),
            sessions=sorted(agent.sessions),
            tokens=sum(len(s.conversation.ids) for s in agent.sessions.values()),
            turns=int(totals.get("turns", 0)),
            ram_bytes=len(slots) * g.slot_bytes,
            disk_bytes=self._disk_bytes(agent, pages),
            fp16_bytes=sum(p.rows for p in pages) * g.raw_row_bytes,
            prompt_tokens=int(totals.get("prompt_tokens", 0)),
            cached_tokens=cached,
            saved_ms=cached / rate if rate else None,
            created=agent.row.created,
            last_used=agent.row.last_used,
        )

    def _disk_bytes(self, agent: Agent, pages: list[Page]) -> int:
        """The agent's share of the extents that its pages lie in, by rows, plus its token log and its rows in the index.

        Rows that several agents use are charged in equal parts of what all of them use; rows that no session uses any more
        fall to those who use the rest of their extent.
        """
        used = self._extent_use(self._memory.agents())
        mine = self._extent_use([agent])
        share = sum(self._store.size_of(e) * n / used[e] for e, n in mine.items())
        index_rows = sum(4 * p.rows + 64 + 32 * len(p.pieces or ()) for p in pages)
        logs = sum(s.log_bytes for s in agent.sessions.values())
        return round(share) + index_rows + logs

    def _extent_use(self, agents: list[Agent]) -> dict[int, int]:
        """Bytes of rows that each agent's pages have in each extent, added up over the agents."""
        g = self._pool.geometry
        use: dict[int, int] = {}
        for piece in (x for a in agents for p in _chain_pages(a) for x in p.pieces or ()):
            row = g.raw_row_bytes if piece.raw else g.packed_row_bytes
            use[piece.extent] = use.get(piece.extent, 0) + piece.rows * row
        return use


def _chain_pages(agent: Agent) -> list[Page]:
    """The pages of all of an agent's sessions, each once."""
    chains = (s.head.chain() for s in agent.sessions.values() if s.head is not None)
    return list(dict.fromkeys(p for chain in chains for p in chain))


def _state(pages: list[Page]) -> State:
    if not pages:
        return "cold"
    return "hot" if all(p.slots is not None for p in pages) else "warm"

"""The runtime: model, store and engine of one home behind thread-safe methods. The HTTP layer calls only this."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from agentmem import __version__
from agentmem.blockpool.extent import FORMAT_VERSION
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.keep import Keep
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.blockpool.vault import Vaults
from agentmem.compose.anchors import Eviction
from agentmem.compose.composer import Composer
from agentmem.compose.keeping import Keeping
from agentmem.compose.ledger import Ledger
from agentmem.compose.library import Library
from agentmem.engine.admission import Admission, device_bytes, model_size
from agentmem.engine.budget import Budget, Limits
from agentmem.engine.census import Census
from agentmem.engine.checkpoints import Checkpoints
from agentmem.engine.composing import Composing
from agentmem.engine.compositions import Compositions
from agentmem.engine.embedding import Embedding
from agentmem.engine.encoders import Encoders
from agentmem.engine.engine import Engine
from agentmem.engine.episodes import Episodes
from agentmem.engine.folds import Folds
from agentmem.engine.job import Drawer
from agentmem.engine.jobs import Jobs
from agentmem.engine.layout import BLANK, Layout, layout
from agentmem.engine.lobby import Lobby
from agentmem.engine.memory import Memory
from agentmem.engine.pace import Pace
from agentmem.engine.planner import Planner
from agentmem.engine.proof import prove
from agentmem.engine.recall import Recall
from agentmem.engine.request import ChatRequest, Event, Failed, Finished, Ticket
from agentmem.engine.roster import Roster
from agentmem.engine.runner import Runner
from agentmem.engine.scheduler import Scheduler
from agentmem.engine.sequence import Sequence
from agentmem.engine.transfer import Transfer
from agentmem.engine.trial import Bench
from agentmem.engine.upkeep import Upkeep
from agentmem.errors import AgentMemError, ModelUnavailable, StoreError
from agentmem.model.grammar import Constraint
from agentmem.model.identity import text_identity
from agentmem.model.loaded import LoadedModel, Progress, load
from agentmem.model.progress import silent
from agentmem.model.tools import ToolFormat
from agentmem.model.verdict_file import VerdictFile
from agentmem.quant import blas
from agentmem.quant.device import backend, leave_thread
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests
from agentmem.settings import Settings

log = logging.getLogger(__name__)

SWITCH_SECONDS = 5e-4
"""How long the engine may wait for a thread that copies rows; Python's own 5 ms is several decode steps."""


def fingerprint(identity: dict[str, str], plan: Layout) -> str:
    """SHA-256 over everything that decides what a stored row means: model, tokenizer, template, format, what keys are corrected
    by, kinds of layers, page size, version."""
    geometry = plan.geometry
    parts = {
        "model": identity,
        "format": plan.format.identity(),
        "layers": [
            [c.shape.heads, c.shape.key_dim, c.shape.value_dim, str(c.format.identity())]
            for c in geometry.codecs
        ],
        "stored": str(geometry.codecs[0].stored),
        "page_tokens": geometry.page_tokens,
        "version": FORMAT_VERSION,
    }
    if plan.calibration is not None:
        parts["calibration"] = plan.calibration
    if plan.kinds:
        parts["kinds"] = plan.kinds
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def limits(settings: Settings) -> Limits:
    """What the settings say of the disk."""
    return Limits(
        disk=int(settings.disk_budget) if settings.disk_budget is not None else None,
        floor=int(settings.disk_floor),
        agent=int(settings.agent_quota) if settings.agent_quota is not None else None,
        namespace=int(settings.namespace_quota) if settings.namespace_quota is not None else None,
        half_life=3600.0 * settings.half_life_hours,
    )


class Runtime(Roster):
    """Everything one daemon serves from. Make it with `open`; all methods may be called from any thread."""

    model_name: str
    max_context: int

    def __init__(
        self, settings: Settings, model: Callable[[], LoadedModel] | None, progress: Progress | None
    ) -> None:
        self._settings = settings
        self._progress = progress or silent
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
        sys.setswitchinterval(SWITCH_SECONDS)
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
        while self._pool.arena.advance():  # the writer waits for copies that were begun
            pass
        self._engine.composing.flush(everything=True)
        self._store.close()
        self._engine.composing.close()

    def _build(self) -> None:
        """On the engine thread: model, self-test, pool, store, memory, engine."""
        settings, model = self._settings, self._make_model()
        self.model_name = model.name
        self.max_context = min(settings.max_context or model.max_context, model.max_context)
        try:
            plan = layout(
                model, settings.kv_format, settings.page_tokens, settings.paths.calibration, self._progress
            )
            if not plan.anatomy.plain:
                prove(model, plan)
            self._fingerprint = fingerprint(model.identity, plan)
            self._verdict = VerdictFile(settings.paths.calibration, model.identity).verdict(
                settings.kv_format
            )
            self._pool = Pool(plan.geometry, int(settings.ram_budget), self._fingerprint)
        except ValueError as error:
            raise ModelUnavailable(str(error)) from error
        self._self_test = self_tests(plan.codecs or [BLANK], plan.query_heads, plan.dtype)
        fused = self._self_test["fused"]["ok"] and plan.attends
        runner = Runner(model, plan.anatomy, fused)
        if self._verdict != "ok":
            log.warning(
                "KV format %s with %s: %s; `agentmem verify MODEL` measures what it costs",
                settings.kv_format, model.name, self._verdict,
            )  # fmt: skip
        self._admission = Admission(
            model_size(model.model, plan.geometry, plan.query_heads, plan.dtype), plan.geometry, self._pool.capacity_bytes,
            settings.memory_bytes(device_bytes()), chunk_tokens=settings.chunk_tokens, fused=fused,
            splits=runner.network.splits,
        )  # fmt: skip
        self._admission.start()
        self._store = Store(
            settings.paths.store,
            self._fingerprint,
            text_identity(model.identity),
            durable=settings.commit != "none",
            wake=lambda: self._engine.wake(),
            vaults=Vaults(settings.paths.keys),
        )
        self._memory = Memory(self._store, self._pool, model.tokenizer, settings.encrypt)
        self._memory.load()
        recall = Recall(self._pool, self._store)
        carried, plain = plan.baggage, plan.anatomy.plain
        checkpoints = Checkpoints(self._memory, self._pool, carried) if carried is not None else None
        encoders = Encoders(settings.episode_encoder, settings.paths.models, lambda: self._engine.wake())
        folds = Folds(self._memory, self._pool, recall, runner.network, model.tokenizer, encoders)
        episodes = Episodes(self._pool, folds, encoders)
        planner = Planner(
            self._memory,
            self._pool,
            model.tokenizer,
            self._admission,
            episodes,
            max_context=self.max_context,
            max_reply=settings.max_reply,
            model=model.name,
            plain=plain,
            checkpoints=checkpoints,
            part=max(1, 2048 // settings.chunk_tokens) * settings.chunk_tokens,
        )
        scheduler: Scheduler[Sequence] = Scheduler(
            Pace(), itl_target_ms=settings.itl_target_ms, chunk_tokens=settings.chunk_tokens
        )
        lobby = Lobby(
            scheduler, self._memory, queue_limit=settings.queue_limit, max_wait_ms=1e3 * settings.max_wait_s,
            max_batch=settings.max_batch,
        )  # fmt: skip
        self._engine = Engine(
            runner, self._memory, self._pool, self._store, recall, planner, chosen(self._self_test),
            scheduler, lobby, self._composing(model, runner, plain), episodes, max_batch=settings.max_batch,
            wait_for_commit=settings.commit == "full", plain=plain, checkpoints=checkpoints,
        )  # fmt: skip
        self._census = Census(
            self._memory, self._pool, self._store, self.model_name, lambda: self._engine.pace.rate
        )
        self._budget = Budget(self._memory, self._pool, self._store, limits(settings))
        self.upkeep = Upkeep(self._store, self._memory, self._engine, settings.scrub_mb_s)
        self.embedding = Embedding(self._call, encoders)
        self.composed = Compositions(self._call, self._engine.composing, model.tokenizer)
        self.jobs = Jobs(
            self._call, self._engine, self._memory, Drawer(settings.paths.jobs, self._store.files)
        )
        self.transfer = Transfer(
            self._call, self._when_idle, self._memory, recall, model, self._fingerprint, self.jobs.check_free
        )

    def _composing(self, model: LoadedModel, runner: Runner, plain: bool) -> Composing:
        bench = Bench(model, runner.network, self._pool, chosen(self._self_test), self._admission)
        return Composing(bench, self._make_composer, self._settings.paths.composed.exists, plain)

    def _make_composer(self) -> Composer | str:
        """On the engine thread, when somebody first asks for composed reuse."""
        settings, store = self._settings, self._store
        budget = int(settings.compose_budget)
        if not self._admission.set_aside(budget):
            return "memory_limit has no room for compose_budget"
        eviction = Eviction(settings.compose_anchors)
        library, ledger = Library(budget // 2, budget - budget // 2, eviction=eviction), Ledger()
        keep = Keep(settings.paths.composed, self._fingerprint, budget, store.files)

        def write(job: Callable[[], None]) -> None:
            store.change(lambda _: job(), lambda _: None)

        keeping = Keeping(library, ledger, keep, write)
        keeping.restore()
        return Composer(library, self._engine.model.tokenizer, ledger, keeping)

    def close(self) -> None:
        """End running replies (they are kept), finish writing, stop the engine."""
        self.jobs.close()
        self._engine.close()
        self._thread.join()
        self.jobs.join()

    @property
    def geometry(self) -> Geometry:
        """How rows lie in slots."""
        return self._pool.geometry

    @property
    def tools(self) -> ToolFormat:
        """How the model is told of tools, and calls them."""
        return self._engine.model.tokenizer.tools

    def constraint(
        self, schema: dict[str, Any] | None, tools: list[dict[str, Any]], name: str | None, *, parallel: bool
    ) -> Constraint:
        """What replies may say; see `ChatTokenizer.constraint`. Takes up to a second."""
        return self._engine.model.tokenizer.constraint(schema, tools, name, parallel=parallel)

    def count(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> int:
        """Tokens of a prompt of these messages. Raises BadRequest where the chat template refuses them."""
        tokenizer = self._engine.model.tokenizer
        return len(tokenizer.encode(tokenizer.render(messages, tools=tools)))

    @property
    def degraded(self) -> str | None:
        """Why turns are not kept at present: "read-only" or "disk-full"; None when they are."""
        return self._store.degraded

    def chat(self, request: ChatRequest, sink: Callable[[Event], None]) -> Ticket:
        """Run one turn. Events reach `sink` from other threads, in order: Started, Delta*, then Finished or Failed.

        Raises at once Overloaded when the queue is full, and ConversationBusy while a job reads into the session.
        """
        self.jobs.check_free(request.namespace, request.agent, request.session)
        sequence = Sequence(request, Ticket(), sink, generate=request.generate)
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

        self.jobs.check_free(request.namespace, request.agent, request.session)
        request.history = "server"
        self._engine.submit(Sequence(request, Ticket(), sink, generate=False))
        return outcome.result()

    def health(self) -> dict[str, Any]:
        """What `doctor` and `/health` show."""
        status = self._store.status()
        return {
            "status": "degraded" if self.degraded else "ok",
            "version": __version__,
            "model": self.model_name,
            "max_context": self.max_context,
            "backend": backend(),
            "blas": blas.status(),
            "self_test": self._self_test,
            "kv_format": self._settings.kv_format,
            "kv_verdict": self._verdict,
            "fingerprint": self._fingerprint,
            "commit": self._settings.commit,
            "uptime_s": time.time() - self._started,
            "waiting": len(self._engine.waiting),
            "active": len(self._engine.active),
            "scheduler": self._scheduling(),
            "memory": self._admission.figures(),
            "store": status,
        }

    def _scheduling(self) -> dict[str, int | float]:
        """What the scheduler does."""
        engine = self._engine
        return {
            "batch": sum(s.phase in ("decode", "closing") for s in list(engine.active)),
            "max_batch": engine.max_batch,
            "itl_target_ms": engine.scheduler.itl_target_ms,
            "itl_ms": round(engine.pace.itl.value, 3),
            "prefetched_requests": engine.prefetch.requests,
            "prefetched_pages": engine.prefetch.pages,
        }

    def store(self) -> dict[str, Any]:
        """Budgets and bytes of RAM and disk, and what agents share. Looks at every page."""
        return {**self.budgets(), **self._call(self._census.bytes)}

    def budgets(self) -> dict[str, Any]:
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
            "disk": {
                **self._store.status(),
                "budget_bytes": self._budget.limits.disk,
                "floor_bytes": self._budget.limits.floor,
                "evicted_bytes": self._budget.evicted_bytes,
                "exceeded": self._budget.exceeded,
                "compactions": self._memory.journal.compactions,
            },
            "composed": {
                "budget_bytes": int(self._settings.compose_budget),
                **self._engine.composing.figures,
            },
            "row_bytes": {"packed": pool.geometry.packed_row_bytes, "fp16": pool.geometry.raw_row_bytes},
            "page_tokens": pool.geometry.page_tokens,
        }

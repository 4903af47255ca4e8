"""`bench store`: what the block store makes of the machine's disk, and what it costs the engine."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import ByteSize

from agentmem.bench import bandwidth, catalogue, sessions
from agentmem.bench.checks import check
from agentmem.bench.turns import say_in_turn
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.index import TurnRow
from agentmem.engine.request import ChatRequest, Delta, Event, Failed, Finished
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import random_model
from agentmem.quant.device import backend
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec
from agentmem.runtime import Runtime
from agentmem.settings import Settings

Say = Callable[[str], None]

WIDE = {
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 256,
}
TEXT = "The keeper counts the ships, trims the lamp, and goes to bed. "


WIDTH = {"cpu": (30, 3, 64), "metal": (32, 8, 128), "cuda": (32, 8, 128)}
"""Layers, KV heads and head size of what is stored: SmolLM2-135M's on a CPU, Llama-3.1-8B's on a GPU."""


def layered(layers: int, heads: int, size: int) -> Geometry:
    """Pages of 64 tokens of a model of that shape."""
    shape = LayerShape(heads, size, size)
    codec = RowCodec(shape, kv_format("q4-plain").for_shape(shape), mx.float16)
    return Geometry((codec,) * layers, 64)


def wide_model() -> LoadedModel:
    """A tiny random model whose state is wide against its arithmetic: 16 KiB a token in 16 bits."""
    return random_model("llama", seed=0, max_position_embeddings=65536, **WIDE)


def _runtime(home: Path) -> Runtime:
    return Runtime.open(Settings(home=home, ram_budget=ByteSize(512 << 20), max_context=65536), wide_model)


BIG_PAGES = 64
PHASE = 50
"""Tokens spoken alone, then as many under the load, so that a noisy machine disturbs both alike. Not a part of a page: the
step in which a page fills must not always lie at the same place of a phase."""
ROUNDS = 3
"""Replies at most; each takes a minute on two cores."""
STALE = 512
"""Pages that were written again before their older rows leave the disk."""


@dataclass(frozen=True, slots=True)
class Load:
    """Commits that go on while somebody speaks: pages of each, and seconds from one to the next."""

    pages: int
    every: float


TURNS = Load(4, 0.25)
"""Four times a second another agent's turn of 256 tokens: more than this machine could speak at once."""

STATES = Load(BIG_PAGES, 0.0)
"""Another agent's whole state, again as soon as it is written: the worst case."""


def delays(folder: Path, tokens: int, rounds: int, say: Say) -> dict[str, Any]:
    """Milliseconds between the tokens of a reply, alone and under either load, and what a commit takes meanwhile.

    In each of `rounds` replies `tokens` tokens are timed alone and as many under commits of turns. A delay is the median over
    the rounds of the difference of two percentiles of one reply.
    """
    runtime = _runtime(folder / "home")
    try:
        writer = _Writer(runtime)
        say_in_turn(runtime, "warm", TEXT, max_tokens=min(tokens, 2 * PHASE))
        alone: list[list[float]] = []
        turns: list[list[float]] = []
        commits: list[list[float]] = []
        for number in range(rounds):
            times = _Reply(runtime, writer, TURNS, tokens).times(f"talker-{number}")
            for many, new in zip((alone, turns, commits), times, strict=True):
                many.append(new)
            say(
                f"round {number}: {_percentile(times[1], 99):.1f} ms, alone {_percentile(times[0], 99):.1f} ms"
            )
        whole, states, writes = _Reply(runtime, writer, STATES, tokens // 4 or 1).times("talker-states")
        every = _all(commits)
        say(f"{len(every)} turns and {len(writes)} whole states were written meanwhile")
        return {
            "rounds": rounds,
            "steps": len(_all(alone)),
            "step_ms": _percentile(_all(alone), 50),
            "p99_alone_ms": _percentile(_all(alone), 99),
            "p99_turns_ms": _percentile(_all(turns), 99),
            "p99_states_ms": _percentile(states, 99),
            "delay_p99_ms": _delay(alone, turns, 99),
            "delay_p50_ms": _delay(alone, turns, 50),
            "states_delay_p99_ms": _delay([whole], [states], 99),
            "commit_ms": _percentile(every, 50),
            "commit_p99_ms": _percentile(every, 99),
            "commits": len(every),
        }
    finally:
        runtime.close()


def _percentile(seconds: list[float], p: int) -> float:
    return 1e3 * float(np.percentile(seconds, p))


def _all(rounds: list[list[float]]) -> list[float]:
    return [seconds for each in rounds for seconds in each]


def _delay(alone: list[list[float]], under: list[list[float]], p: int) -> float:
    """Median over the rounds."""
    return statistics.median(_percentile(b, p) - _percentile(a, p) for a, b in zip(alone, under, strict=True))


class _Reply:
    """One reply, during which the load goes on and off."""

    def __init__(self, runtime: Runtime, writer: _Writer, load: Load, tokens: int) -> None:
        self._runtime, self._writer, self._load, self._tokens = runtime, writer, load, tokens
        self._phase = min(PHASE, max(1, tokens // 2))
        self._on, self._off, self._over = threading.Event(), threading.Event(), threading.Event()
        self._times: list[float] = []
        self._spans: list[tuple[float, float]] = []
        self._commits: list[float] = []

    def times(self, agent: str) -> tuple[list[float], list[float], list[float]]:
        """Seconds between tokens alone, between tokens under the load, and of each commit."""
        visitor = threading.Thread(target=self._keep_writing)
        visitor.start()
        messages = [{"role": "user", "content": TEXT}]
        request = ChatRequest(agent, messages, history="server", max_tokens=2 * self._tokens + 1)
        self._runtime.chat(request, self._sink)
        self._over.wait()
        self._off.set()
        self._on.set()
        visitor.join()
        self._writer.sweep()
        gaps = list(itertools.pairwise(self._times))
        under = [any(a < end and b > start for start, end in self._spans) for a, b in gaps]
        both = [[b - a for (a, b), u in zip(gaps, under, strict=True) if u is kind] for kind in (False, True)]
        return both[0], both[1], self._commits

    def _sink(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._times.append(time.perf_counter())
            turn, at = divmod(len(self._times), self._phase)
            if at == 0:
                (self._off if turn % 2 else self._on).clear()
                (self._on if turn % 2 else self._off).set()
        elif isinstance(event, Finished | Failed):
            self._over.set()

    def _keep_writing(self) -> None:
        while self._on.wait() and not self._over.is_set():
            start = time.perf_counter()
            while not self._off.is_set():
                self._commits.append(self._writer.write(self._load.pages))
                self._off.wait(max(0.0, self._load.every - self._commits[-1]))
            self._spans.append((start, time.perf_counter()))


class _Writer:
    """Another agent, whose last pages are committed again and again as new turns, the way that every turn goes."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        runtime._call(lambda: bandwidth.fill(runtime._pool, runtime._memory, BIG_PAGES))
        while runtime._call(lambda: runtime._memory.unwritten):
            time.sleep(0.01)
        self._turns = itertools.count(2)
        self._stale: list[int] = []

    def write(self, pages: int) -> float:
        """Seconds until the engine knows that a turn of so many pages is on disk."""
        outcome: Future[Exception | None] = Future()

        def submit() -> None:
            memory = self._runtime._memory
            agent, session = memory.open("bench", "bench", "default")
            assert session.head is not None
            chosen = session.head.chain()[-pages:]
            self._stale += [p.id for p in chosen if p.id is not None]
            for page in chosen:
                page.pieces, page.id = None, None
            ids = np.concatenate([p.tokens for p in chosen])
            said = [{"role": "assistant", "content": TEXT * pages}]
            turn = TurnRow(next(self._turns), 0, 0, ids, [("text", len(ids), None)], said, {}, 0.0)
            memory.finish(agent, session, turn, session.head, lambda _, error: outcome.set_result(error))

        start = time.perf_counter()
        self._runtime._call(submit)
        if (error := outcome.result()) is not None:
            raise error
        seconds = time.perf_counter() - start
        if len(self._stale) >= STALE:
            self.sweep()
        return seconds

    def sweep(self) -> None:
        """Older rows of pages that were written again leave the disk."""
        done = threading.Event()
        stale, self._stale = self._stale, []
        self._runtime._call(lambda: self._runtime._store.evict(stale, {}, lambda *_: done.set()))
        done.wait()


def run(
    *, pages: int, agents: int, turns: int, steps: int, megabytes: int, repeats: int, say: Say
) -> dict[str, Any]:
    """The whole benchmark with its checks."""
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as name:
        folder = Path(name)
        model = wide_model()
        geometry = layered(*WIDTH[backend()])
        say(f"bandwidth of {megabytes} MiB")
        speed = bandwidth.measure(geometry, model.tokenizer, folder / "bandwidth", megabytes, repeats)
        many = sessions.measure(folder / "sessions", geometry, model.tokenizer, turns, repeats, say)
        gaps = delays(folder / "delays", steps, min(ROUNDS, repeats), say)
        listing = catalogue.measure(folder / "catalogue", model.tokenizer, pages, agents, say)
    figures = {"bandwidth": speed, "session": many, "decode": gaps, "catalogue": listing}
    result = {"schema_version": 1, "backend": backend(), **figures}
    return {**result, "checks": checks(result)}


def checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that are promised for this backend."""
    speed, many, gaps, listing = (result[k] for k in ("bandwidth", "session", "decode", "catalogue"))
    restore = (
        check("restore / bare mx.load", speed["restore_over_mx_load"], 0.95, "ratio", False)
        if result["backend"] == "cuda"
        else check("restore / parallel pread", speed["restore_over_pread"], 0.8, "ratio", False)
    )
    return [
        restore,
        check(
            f"restore of {many['turns']} turns / of the same tokens at once",
            many["many_over_once"],
            0.8,
            "ratio",
            False,
        ),
        check(
            "delay of a decode step by commits of turns, p99",
            gaps["delay_p99_ms"],
            2.0,
            "ms",
            True,
        ),
        check(
            f"lookup of 4K tokens among {listing['pages']} pages", listing["lookup_4k_ms"], 1.0, "ms", True
        ),
        check(
            f"lookup of 128K tokens among {listing['pages']} pages",
            listing["lookup_128k_ms"],
            10.0,
            "ms",
            True,
        ),
        check("fork", listing["fork_ms"], 5.0, "ms", True),
        check(f"open with {listing['pages']} pages after a crash", listing["open_s"], 2.0, "s", True),
        check("bytes written by a turn / its rows in 16 bits", many["written_per_turn"], 1.2, "ratio", True),
    ]

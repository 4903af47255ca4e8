"""`bench store`: what the block store makes of the machine's disk, and what it costs the engine."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import ByteSize

from agentmem.bench import bandwidth, catalogue, sessions
from agentmem.bench.checks import check
from agentmem.bench.turns import say_in_turn
from agentmem.blockpool.extent import write_extent
from agentmem.blockpool.geometry import Geometry
from agentmem.engine.commit_rows import CommitRows
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


@dataclass(frozen=True, slots=True)
class Load:
    """Commits that go on while somebody speaks: pages of each, and seconds from one to the next."""

    pages: int
    every: float


TURNS = Load(4, 0.25)
"""Four times a second another agent's turn of 256 tokens: more than this machine could speak at once."""

STATES = Load(BIG_PAGES, 0.0)
"""Another agent's whole state, again as soon as it is written: the worst case."""


def delays(folder: Path, tokens: int, say: Say) -> dict[str, Any]:
    """Milliseconds between the tokens of a reply, alone and under either load, and what a commit takes meanwhile."""
    runtime = _runtime(folder / "home")
    (folder / "scratch").mkdir()
    try:
        runtime._call(lambda: bandwidth.fill(runtime._pool, runtime._memory, BIG_PAGES))
        say_in_turn(runtime, "talker", TEXT, max_tokens=tokens)
        alone = _gaps(runtime, tokens)
        turns, commits = _under(runtime, folder, TURNS, tokens)
        states, writes = _under(runtime, folder, STATES, tokens)
        say(f"{len(commits)} turns and {len(writes)} whole states were written meanwhile")
        return {
            "step_ms": _percentile(alone, 50),
            "p99_alone_ms": _percentile(alone, 99),
            "p99_turns_ms": _percentile(turns, 99),
            "p99_states_ms": _percentile(states, 99),
            "commit_ms": _percentile(commits, 50),
            "commit_p99_ms": _percentile(commits, 99),
            "commits": len(commits),
        }
    finally:
        runtime.close()


def _percentile(seconds: list[float], p: int) -> float:
    return 1e3 * float(np.percentile(seconds, p))


def _gaps(runtime: Runtime, tokens: int) -> list[float]:
    """Seconds between the tokens of one reply."""
    times: list[float] = []
    over = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Delta):
            times.append(time.perf_counter())
        elif isinstance(event, Finished | Failed):
            over.set()

    messages = [{"role": "user", "content": TEXT}]
    runtime.chat(ChatRequest("talker", messages, history="server", max_tokens=tokens), sink)
    over.wait()
    return [b - a for a, b in itertools.pairwise(times)]


def _under(runtime: Runtime, folder: Path, load: Load, tokens: int) -> tuple[list[float], list[float]]:
    """(seconds between the tokens of a reply under a load, seconds that each of its commits took)."""
    stop = threading.Event()
    seconds: list[float] = []

    def keep_writing() -> None:
        while True:
            seconds.append(_write(runtime, folder / "scratch", load.pages))
            if stop.wait(max(0.0, load.every - seconds[-1])):
                return

    writer = threading.Thread(target=keep_writing)
    writer.start()
    gaps = _gaps(runtime, tokens)
    stop.set()
    writer.join()
    return gaps, seconds


def _write(runtime: Runtime, scratch: Path, pages: int) -> float:
    """Put the last pages of the big agent on disk once more, through the writer thread and the way that every commit goes.

    Returns the seconds until the engine knows of it.
    """
    done = threading.Event()

    def submit() -> None:
        state = [p for p in runtime._memory.find("bench", "bench").pages() if p.slots is not None]
        chosen = sorted(state, key=lambda p: p.start)[-pages:]
        data = CommitRows(runtime._pool, chosen, runtime._memory.ids.extent()).data(
            "default", runtime._store.names
        )
        assert data is not None

        def job(_: Any) -> None:
            name, _size = write_extent(scratch, data(), runtime._store.files)
            os.unlink(scratch / name)

        runtime._store.change(job, lambda _: done.set())

    start = time.perf_counter()
    runtime._call(submit)
    done.wait()
    return time.perf_counter() - start


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
        gaps = delays(folder / "delays", steps, say)
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
            gaps["p99_turns_ms"] - gaps["p99_alone_ms"],
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

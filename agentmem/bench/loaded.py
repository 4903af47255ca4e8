"""A runtime under load: time between tokens while a long prompt is read, and time to the first token beside others.

Everything goes through `Runtime.chat`, and the times between tokens are those of the events that a client gets.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import ByteSize

from agentmem.bench.checks import check
from agentmem.bench.restore import prompt
from agentmem.bench.toll import Toll
from agentmem.bench.turns import finished_turn, say_in_turn
from agentmem.engine.layout import layout
from agentmem.engine.request import ChatRequest, Delta, Event, Failed, Finished
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend
from agentmem.runtime import Runtime
from agentmem.settings import Settings

REPLY = 2048
"""Tokens of a turn of those who speak all the time; the next turn follows at once."""
TURNS = 2
VISIT = 4
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` agents speak on contexts of `context` tokens, agents with `warm` tokens on disk come back, and a cold prompt
    of `prompt` tokens arrives. `gaps` tokens of each stream are timed without either; visits are repeated `repeats` times.
    The same prompt is also read while nobody speaks."""

    streams: int
    context: int
    warm: int
    prompt: int
    chunk: int
    gaps: int
    repeats: int = 3


def default_load() -> Load:
    """What this backend carries in well under a minute; on a CPU, in a few."""
    if backend() == "cpu":
        return Load(streams=3, context=128, warm=256, prompt=2048, chunk=512, gaps=32)
    return Load(streams=8, context=1024, warm=4096, prompt=16384, chunk=2048, gaps=200)


class _Speaker:
    """An agent that speaks until it is stopped, one turn after the other; `times` are those of its tokens, by turn."""

    def __init__(self, runtime: Runtime, name: str, text: str) -> None:
        self._runtime, self._name = runtime, name
        self.times: list[tuple[int, float]] = []
        self.failed: Exception | None = None
        self._turn = 0
        self._stopping = False
        self._over = threading.Event()
        self._say(text)

    def _say(self, text: str) -> None:
        messages = [{"role": "user", "content": text}]
        request = ChatRequest(self._name, messages, history="server", max_tokens=REPLY)
        self._ticket = self._runtime.chat(request, self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.times.append((self._turn, time.perf_counter()))
        elif isinstance(event, Failed):
            self.failed = event.error
            self._over.set()
        elif isinstance(event, Finished) and self._stopping:
            self._over.set()
        elif isinstance(event, Finished):
            self._turn += 1
            self._say("Go on.")

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between the tokens of a turn, of those that came between `since` and `until`."""
        times = list(self.times)
        return [
            b - a
            for (turn, a), (same, b) in itertools.pairwise(times)
            if turn == same and since <= b and a <= until
        ]

    def stop(self) -> None:
        self._stopping = True
        self._ticket.cancel()
        self._over.wait()


class LoadedBench:
    """One runtime with its agents. `format` is the KV format."""

    def __init__(
        self, model: LoadedModel, load: Load, format: str, home: Path, say: Callable[[str], None]
    ) -> None:
        self.model, self.load, self.say = model, load, say
        tokens = (
            load.streams * (load.context + TURNS * REPLY + 256)
            + (2 * load.repeats + 2) * (load.warm + 256)
            + load.prompt * 17 // 8 + 512
        )  # fmt: skip
        defaults = Settings(home=home)
        g = layout(model, format, defaults.page_tokens, defaults.paths.calibration).geometry
        self.settings = Settings(
            home=home, kv_format=format, chunk_tokens=load.chunk,
            ram_budget=ByteSize(g.slot_bytes * (g.worst_slots(tokens) + 16 * g.worst_slots(1))),
        )  # fmt: skip
        self.runtime = Runtime.open(self.settings, lambda: model)
        self._prompts = {
            n: prompt(model, n) for n in {load.context, load.warm, load.prompt, load.prompt // 8}
        }

    def _text(self, name: str, tokens: int) -> str:
        """A prompt that no other agent's begins like."""
        return f"{name}: {self._prompts[tokens]}"

    def run(self) -> dict[str, Any]:
        load = self.load
        names = [f"visitor-{i}" for i in range(2 * load.repeats + 2)]
        visitors = iter(names)
        for name in names:
            say_in_turn(self.runtime, name, self._text(name, load.warm), max_tokens=VISIT)
            self.runtime.evict(name)
        self._visit(next(visitors))
        idle = [self._visit(next(visitors)) for _ in range(load.repeats)]
        mx.reset_peak_memory()
        self.say("the long prompt, alone")
        alone_ttft, _ = self._cold("alone", load.prompt)
        speakers = [
            _Speaker(self.runtime, name, self._text(name, load.context))
            for name in (f"speaker-{i}" for i in range(load.streams))
        ]
        try:
            self._until(speakers, 8)
            self.say(f"{load.streams} streams run")
            self._visit(next(visitors))
            with Toll(self.runtime._engine.composing) as toll:
                alone = self._alone(speakers)
            busy = [self._visit(next(visitors)) for _ in range(load.repeats)]
            self._cold("first", load.prompt // 8)
            self.say("the long prompt arrives")
            start = time.perf_counter()
            long_ttft, prompt_tokens = self._cold("second", load.prompt)
            beside = [gap for s in speakers for gap in s.gaps(start, time.perf_counter())]
        finally:
            for speaker in speakers:
                speaker.stop()
        _raise(speakers)
        return {
            **asdict(load), "itl_target_ms": self.settings.itl_target_ms, "composing_share": toll.share,
            "alone": _percentiles(alone), "beside_prompt": _percentiles(beside),
            "prompt_tokens": prompt_tokens, "prompt_ttft_ms": long_ttft, "alone_ttft_ms": alone_ttft,
            "warm_idle_ttft_ms": float(np.median(idle)), "warm_loaded_ttft_ms": float(np.median(busy)),
            "warm_idle_ttfts_ms": idle, "warm_loaded_ttfts_ms": busy,
            "peak_bytes": mx.get_peak_memory(), "predicted_bytes": self._predicted(prompt_tokens),
        }  # fmt: skip

    def _visit(self, name: str) -> float:
        """Milliseconds to the first token of an agent that comes back from disk."""
        memory = say_in_turn(self.runtime, name, "And now?", max_tokens=VISIT)["agentmem"]
        assert memory["state_before"] == "warm"
        return float(memory["ttft_ms"])

    def _cold(self, name: str, tokens: int) -> tuple[float, int]:
        """(milliseconds to the first token of a prompt that nothing is remembered of, its tokens)."""
        messages = [{"role": "user", "content": self._text(name, tokens)}]
        usage = finished_turn(self.runtime, name, messages, 1).usage
        return float(usage["agentmem"]["ttft_ms"]), int(usage["prompt_tokens"])

    def _alone(self, speakers: list[_Speaker]) -> list[float]:
        start = time.perf_counter()
        self._until(speakers, self.load.gaps, start)
        return [gap for s in speakers for gap in s.gaps(start, time.perf_counter())]

    def _until(self, speakers: list[_Speaker], tokens: int, since: float = 0.0) -> None:
        """Wait until each has said `tokens` tokens since then. Raises what one of them failed with, or TimeoutError."""
        deadline = time.perf_counter() + PATIENCE_S
        while any(sum(at >= since for _, at in list(s.times)) < tokens for s in speakers):
            _raise(speakers)
            if time.perf_counter() > deadline:
                raise TimeoutError("the streams say nothing; does the model make text?")
            time.sleep(0.01)

    def _predicted(self, prompt_tokens: int) -> int:
        """What admission expects of the device's memory while the long prompt is read, alone or beside the streams."""
        admission, load = self.runtime._admission, self.load
        beside = [prompt_tokens + 1, *[load.context + REPLY] * load.streams]
        return max(admission.peak([prompt_tokens + 1]), admission.peak(beside))


def _raise(speakers: list[_Speaker]) -> None:
    for speaker in speakers:
        if speaker.failed is not None:
            raise speaker.failed


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    p50, p99 = np.percentile(seconds, [50, 99]) if seconds else (float("nan"), float("nan"))
    worst = max(seconds, default=float("nan"))
    return {
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
        "max_ms": 1e3 * worst,
        "gaps": len(seconds),
    }


def measure(model: LoadedModel, load: Load, format: str, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures, on a home of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as home:
        bench = LoadedBench(model, load, format, Path(home), say)
        try:
            return bench.run()
        finally:
            bench.runtime.close()


def checks(under: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of a GPU."""
    target, n = under["itl_target_ms"], under["streams"]
    ratio = under["warm_loaded_ttft_ms"] / under["warm_idle_ttft_ms"]
    off = abs(under["peak_bytes"] / under["predicted_bytes"] - 1)
    return [
        check(
            f"p99 between tokens while {under['prompt']} tokens are read / target",
            under["beside_prompt"]["p99_ms"] / target, 2.0, "ratio", True,
        ),
        check(f"TTFT of a warm agent beside {n} streams / idle", ratio, 3.0, "ratio", True),
        check("peak memory, off the prediction by", off, 0.1, "ratio", True),
        check("composed reuse, off: share of the streams' time", under["composing_share"], 0.01, "ratio", True),
    ]  # fmt: skip

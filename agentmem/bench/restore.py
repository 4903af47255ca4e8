"""`bench restore`: time to first token cold, hot and warm, and stock mlx-lm's in the same run."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import ByteSize

from agentmem.bench import bandwidth, stock
from agentmem.bench.checks import check
from agentmem.bench.toll import Toll
from agentmem.bench.turns import finished_turn
from agentmem.engine.request import Finished
from agentmem.model import seam
from agentmem.model.anatomy import anatomy
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend
from agentmem.runtime import Runtime
from agentmem.settings import Settings

Say = Callable[[str], None]

SENTENCE = "The keeper counts the ships, trims the lamp and writes the hour into the book. "


def prompt(model: LoadedModel, tokens: int) -> str:
    """User text whose rendered prompt has `tokens` tokens, give or take one sentence."""
    per = len(model.tokenizer.encode(SENTENCE * 8)) / 8
    head = len(model.tokenizer.encode(model.tokenizer.render([{"role": "user", "content": ""}])))
    return SENTENCE * max(1, round((tokens - head) / per))


def drop_page_cache(folder: Path) -> bool:
    """Ask the kernel to forget the cached pages of the files below `folder`; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return True


class RestoreBench:
    """Measures one model at several context lengths. Each figure comes from this one run."""

    def __init__(
        self, model: LoadedModel, folder: Path, *, chunk: int, repeats: int, drop_cache: bool, say: Say
    ) -> None:
        self.model, self.folder, self.chunk, self.repeats, self.drop, self.say = (
            model,
            folder,
            chunk,
            repeats,
            drop_cache,
            say,
        )
        seam.install(model.model)
        mx.eval(model.model.parameters())

    def open(self, home: Path, tokens: int) -> Runtime:
        row = sum(s.heads * (s.key_dim + s.value_dim) * 2 for s in anatomy(self.model.model).shapes)
        budget = max(64 << 20, int(1.5 * row * (0.3 * tokens + 400)))
        return Runtime.open(
            Settings(home=home, ram_budget=ByteSize(budget), chunk_tokens=self.chunk), lambda: self.model
        )

    def measure(self, tokens: int) -> dict[str, Any]:
        """All figures at one context length.

        Hot and warm are "state + first token": the same conversation is asked again, all but its last token is remembered.
        Warm turns follow a new start of the runtime and find nothing in RAM; the first of them, which also pays for new
        memory and untouched kernels, is reported on its own. Follow-ups bring a new message.
        """
        home = self.folder / f"home-{tokens}"
        messages = [{"role": "user", "content": prompt(self.model, tokens)}]
        runtime = self.open(home, tokens)
        try:
            self.say(f"{tokens} tokens: cold")
            self._compile(runtime, min(tokens, 200) if backend() == "cpu" else tokens)
            cold = finished_turn(runtime, "bench", messages, 4)
            info = runtime.agent("bench")
            with Toll(runtime._engine.composing) as toll:
                hot = [finished_turn(runtime, "bench", messages, 4) for _ in range(self.repeats)]
        finally:
            runtime.close()
        self.say(f"{tokens} tokens: warm")
        warm, follow = self._warm(home, tokens, messages)
        self.say(f"{tokens} tokens: stock mlx-lm")
        ids = self.model.tokenizer.encode(self.model.tokenizer.render(messages))
        peer = stock.measure(self.model.model, ids, self.folder, chunk=self.chunk, repeats=self.repeats)
        return self._row(tokens, cold, hot, warm, follow, info, peer) | {"composing_share": toll.share}

    def _compile(self, runtime: Runtime, tokens: int) -> None:
        """One turn that is not measured: kernels are compiled at their first use."""
        finished_turn(runtime, "compile", [{"role": "user", "content": prompt(self.model, tokens)}], 2)
        runtime.forget("compile")

    def _warm(
        self, home: Path, tokens: int, messages: list[dict[str, Any]]
    ) -> tuple[list[Finished], list[Finished]]:
        """(first tokens from a new start, the first of them first; follow-up turns), all with nothing in RAM."""
        runtime = self.open(home, tokens)
        try:
            again = [self._from_disk(runtime, home, messages) for _ in range(self.repeats + 1)]
            follow, last = [], again[-1]
            for n in range(self.repeats):
                messages = [
                    *messages,
                    {"role": "assistant", "content": last.text},
                    {"role": "user", "content": f"And {n}?"},
                ]
                last = self._from_disk(runtime, home, messages)
                follow.append(last)
        finally:
            runtime.close()
        return again, follow

    def _from_disk(self, runtime: Runtime, home: Path, messages: list[dict[str, Any]]) -> Finished:
        runtime.evict("bench")
        if self.drop:
            drop_page_cache(home)
        turn = finished_turn(runtime, "bench", messages, 4)
        assert turn.usage["agentmem"]["state_before"] == "warm"
        return turn

    def _row(
        self, tokens: int, cold: Finished, hot: list[Finished], warm: list[Finished], follow: list[Finished], info: Any,
        peer: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        def median(turns: list[Finished], key: str) -> float:
            return statistics.median(float(t.usage["agentmem"][key]) for t in turns)

        cold_ms, warm_ms = median([cold], "ttft_ms"), median(warm[1:], "ttft_ms")
        return {
            "tokens": tokens,
            "prompt_tokens": cold.usage["prompt_tokens"],
            "cold_ttft_ms": cold_ms,
            "hot_ttft_ms": median(hot, "ttft_ms"),
            "warm_ttft_ms": warm_ms,
            "warm_restore_ms": median(warm[1:], "restore_ms"),
            "speedup_warm": cold_ms / warm_ms,
            "first_warm_ttft_ms": median(warm[:1], "ttft_ms"),
            "follow_up_tokens": median(follow, "prefilled_tokens"),
            "follow_up_warm_ttft_ms": median(follow, "ttft_ms"),
            "bytes_disk": info["disk_bytes"],
            "bytes_fp16": info["fp16_bytes"],
            "bytes_ratio": info["disk_bytes"] / info["fp16_bytes"],
            "stock": peer,
            "warm_over_stock_q4": warm_ms / peer["q4"]["warm_ms"],
        }


def run(
    model: LoadedModel,
    lengths: list[int],
    *,
    chunk: int,
    repeats: int,
    drop_cache: bool,
    megabytes: int,
    say: Say,
) -> dict[str, Any]:
    """The whole benchmark: rows per length, bandwidth, and the checks that this machine can make."""
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as name:
        folder = Path(name)
        bench = RestoreBench(model, folder, chunk=chunk, repeats=repeats, drop_cache=drop_cache, say=say)
        rows = [bench.measure(n) for n in lengths]
        say(f"bandwidth of {megabytes} MiB")
        runtime = bench.open(folder / "geometry", 64)
        geometry = runtime.geometry
        runtime.close()
        speed = bandwidth.measure(geometry, model.tokenizer, folder / "bandwidth", megabytes, repeats)
    sealed = geometry.packed_row_bytes / geometry.raw_row_bytes
    return {
        "schema_version": 1,
        "model": model.name,
        "backend": backend(),
        "drop_cache": drop_cache,
        "rows": rows,
        "bandwidth": speed,
        "sealed_bytes_ratio": sealed,
        "checks": checks(rows, speed, sealed),
    }


def checks(rows: list[dict[str, Any]], speed: dict[str, Any], sealed: float) -> list[dict[str, Any]]:
    """The figures that are promised for this backend, at the lengths that were run."""
    out = [check("sealed pages / fp16 bytes", sealed, 0.285, "ratio", True)]
    cuda = backend() == "cuda"
    read = speed["mx_load_gb_s"] if cuda else speed["pread_gb_s"]
    for row in rows:
        n = row["tokens"]
        out.append(
            check(
                f"composed reuse, off: share of hot turns at {n}", row["composing_share"], 0.01, "ratio", True
            )
        )
        for least, bound in ((4096, 0.31), (1024, 0.37)):
            if n >= least:
                out.append(check(f"bytes on disk / fp16 at {n}", row["bytes_ratio"], bound, "ratio", True))
                break
        limit = 1.5 * row["hot_ttft_ms"] + row["bytes_disk"] / read / 1e6
        if n >= 1024 and not cuda:
            slowest = max(row["warm_ttft_ms"], row["follow_up_warm_ttft_ms"])
            out.append(
                check(f"warm / cold TTFT at {n}", slowest / row["cold_ttft_ms"], 1 / 15, "ratio", True)
            )
        if n >= 1024:
            out.append(
                check(f"warm TTFT at {n} against 1.5 hot + read time", row["warm_ttft_ms"], limit, "ms", True)
            )
        if cuda and n in (4096, 32768):
            bound = 9.0 if n == 4096 else 17.0
            out.append(check(f"cold / warm TTFT at {n}", row["speedup_warm"], bound, "ratio", False))
        if cuda:
            stock_ratio = row["stock"]["q4"]["speedup"]
            out.append(
                check(
                    f"cold / warm TTFT at {n} against stock's Q4 file",
                    row["speedup_warm"],
                    stock_ratio,
                    "ratio",
                    False,
                )
            )
    if cuda:
        out.append(check("restore / bare mx.load", speed["restore_over_mx_load"], 0.95, "ratio", False))
    else:
        out.append(check("restore / parallel pread", speed["restore_over_pread"], 0.8, "ratio", False))
    return out

"""Long lives in the daemon: what a turn costs at several times the budget, what is in RAM, and what a change of episode takes."""

from __future__ import annotations

import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ByteSize

from agentmem.bench.checks import check
from agentmem.bench.turns import say_in_turn
from agentmem.engine.layout import layout
from agentmem.engine.request import ChatRequest
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend
from agentmem.runtime import Runtime
from agentmem.settings import Settings

REPLY = 2
QUESTION = "Tell me more of that."


class LivedBench:
    """One runtime. Histories are chats of two people on two subjects in turn, a quarter of a block a message at most."""

    def __init__(
        self, model: LoadedModel, home: Path, format: str, budget: int, block: int, repeats: int, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.budget, self.block, self.repeats, self.say = budget, block, repeats, say
        defaults = Settings(home=home)
        self.geometry = layout(model, format, defaults.page_tokens, defaults.paths.calibration).geometry
        slots = self.geometry.worst_slots(6 * (budget + 4 * block))
        self.runtime = Runtime.open(
            Settings(
                home=home, kv_format=format, chunk_tokens=min(block, 2048), episode_encoder="hash512",
                ram_budget=ByteSize(slots * self.geometry.slot_bytes),
            ),
            lambda: model,
        )  # fmt: skip
        self._tokens = len(model.tokenizer.encode(" ".join(_lines(0)))) / len(_lines(0))
        self._slots = self.runtime._pool.slots

    def run(self, multiples: Sequence[int]) -> dict[str, Any]:
        rows, folds = [], self.runtime._engine.episodes.folds
        for times in multiples:
            name = f"times-{times}"
            policy = {
                "kind": "episodic",
                "budget_tokens": self.budget,
                "block_tokens": self.block,
                "episodes": 2,
            }
            self.runtime.create(name, {"memory": policy})
            self._slots.peak = folds.most_rows = 0
            begun = time.perf_counter()
            self._live(name, times * self.budget)
            seconds = time.perf_counter() - begun
            self.runtime.evict(name)
            rows.append({"times": times, "tokens": self.runtime.episodes(name)["tokens"], "live_s": seconds,
                         "peak_rows": max(self._slots.peak * self.geometry.page_tokens, folds.most_rows)})  # fmt: skip
            self.say(
                f"{times} budgets: {rows[-1]['tokens']} tokens in {seconds:.0f} s, {rows[-1]['peak_rows']:.0f} rows at most"
            )
        turns_of = self._turns([f"times-{row['times']}" for row in rows])
        for row in rows:
            name = f"times-{row['times']}"
            turns = turns_of[name]
            row["same_episode_restored"] = sum(restored for restored, _ in turns if restored is not None)
            row["ttfts_ms"] = [ms for _, ms in turns]
            row["ttft_ms"] = float(np.median(row["ttfts_ms"]))
            told = self.runtime.episodes(name)
            row |= {"resident_tokens": told["resident_tokens"], "evicted_tokens": told["evicted_tokens"]}
            self.say(
                f"{row['times']} budgets: first token after {row['ttft_ms']:.1f} ms, {told['resident_tokens']} rows stay"
            )
            self.runtime.evict(name)
        switch = self._switches(f"times-{multiples[0]}")
        return {
            "schema_version": 1, "backend": backend(), "budget": self.budget, "block": self.block, "rows": rows,
            "switch": switch, "checks": self._checks(rows, switch),
        }  # fmt: skip

    def _live(self, name: str, tokens: int) -> None:
        """Say as much, subject by subject, and let it be folded."""
        said, number = 0, 0
        while said < tokens:
            messages: list[dict[str, Any]] = []
            while len(messages) < 24 and said < tokens:
                lines = _lines(number // 24 % 2)
                some = max(1, round(self.block / 4 / self._tokens / 2))
                text = " ".join(lines[(number + i) % len(lines)] for i in range(some))
                messages.append({"role": ("user", "assistant")[number % 2], "content": f"{text} ({number})"})
                said, number = said + int(some * self._tokens), number + 1
            self.runtime.append(ChatRequest(name, messages, history="server"))
            self._settle()

    def _turns(self, names: Sequence[str]) -> dict[str, list[tuple[int | None, float]]]:
        """What each agent's turns took, one of each in turn; the first ones do not count."""
        turns: dict[str, list[tuple[int | None, float]]] = {name: [] for name in names}
        for name in names:
            self.runtime.warm(name)
        for _ in range(2 + 3 * self.repeats):
            for name in names:
                turns[name].append(self._asked(name))
        return {name: found[2:] for name, found in turns.items()}

    def _asked(self, name: str) -> tuple[int | None, float]:
        """A turn: tokens that were restored, None where it went to another episode, and milliseconds to its first token."""
        self._settle()
        before = self._active(name)
        memory = say_in_turn(self.runtime, name, QUESTION, REPLY)["agentmem"]
        return memory["restored_tokens"] if self._active(name) == before else None, memory["ttft_ms"]

    def _active(self, name: str) -> list[int]:
        return [e["id"] for e in self.runtime.episodes(name)["episodes"] if e["active"]]

    def _settle(self) -> None:
        folds, memory = self.runtime._engine.episodes.folds, self.runtime._memory
        while self.runtime._call(lambda: folds.pending or bool(memory.unwritten)):
            time.sleep(0.005)

    def _switches(self, name: str) -> dict[str, Any]:
        """Milliseconds a row: to another episode, cold on disk; and a whole agent of as many rows that comes back."""
        plain, ms = "plain", {"switch": list[float](), "warm": list[float]()}
        self._live(plain, self.budget)
        for i in range(2 * self.repeats):
            for kind, agent, text in (("switch", name, _lines(i % 2)[0]), ("warm", plain, QUESTION)):
                self._settle()
                self.runtime.evict(agent)
                memory = say_in_turn(self.runtime, agent, text, REPLY)["agentmem"]
                ms[kind].append(memory["restore_ms"] / max(1, memory["restored_tokens"]))
        told = self.runtime.episodes(name)["episodes"]
        return {
            "ms_a_row": {kind: float(np.median(each)) for kind, each in ms.items()},
            "hits": {e["id"]: e["hits"] for e in told},
        }

    def _checks(self, rows: list[dict[str, Any]], switch: dict[str, Any]) -> list[dict[str, Any]]:
        # The tail is what is newer than a view: a turn waits for a newer one when it is two blocks long.
        held = self.geometry.worst_slots(self.budget + 3 * self.block) * self.geometry.page_tokens
        most = max(row["peak_rows"] for row in rows) / held
        out = [check("rows in RAM at most / (budget + block + a tail of two)", most, 1.0, "ratio", True)]
        near, far = rows[0], rows[-1]
        if far["times"] >= 4 * near["times"]:
            name = f"first token at {far['times']} budgets / at {near['times']}"
            out.append(check(name, far["ttft_ms"] / near["ttft_ms"], 1.2, "ratio", True))
        per = switch["ms_a_row"]
        out.append(
            check(
                "change of episode / return of as many rows", per["switch"] / per["warm"], 1.2, "ratio", True
            )
        )
        restored = sum(row["same_episode_restored"] for row in rows)
        out.append(check("tokens restored by turns of the same episode", restored, 0.0, "tokens", True))
        return out


@cache
def _lines(subject: int) -> list[str]:
    """What is said about one of two subjects."""
    known = tomllib.loads(files("agentmem.bench").joinpath("topics.toml").read_text(encoding="utf-8"))
    return list(known["topic"][subject]["lines"])


def measure(
    model: LoadedModel, format: str, budget: int, block: int, multiples: Sequence[int], repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """All figures, on a home of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as home:
        bench = LivedBench(model, Path(home), format, budget, block, repeats, say)
        try:
            return bench.run(multiples)
        finally:
            bench.runtime.close()

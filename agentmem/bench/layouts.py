"""What works with the layers of each of mlx-lm's architectures, tried on tiny random models."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from agentmem.bench.checks import check
from agentmem.bench.turns import finished_turn, say_in_turn
from agentmem.engine.request import Finished
from agentmem.errors import AgentMemError
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import random_model
from agentmem.model.zoo import NOT_RUN, ZOO
from agentmem.runtime import Runtime
from agentmem.settings import Settings

TEXT = "the lamp keeper counts the oil and writes it down, night by night, before the tide comes in; " * 4
FEATURES = ("exact", "batched", "shared", "composed", "episodic")
BUDGET = 256
SETTLED_S = 60.0


def measure(
    architectures: Iterable[str] | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`rows`: by architecture, kinds of layers and which of `FEATURES` work, or why it is refused; `checks`."""
    wanted = sorted(ZOO) if architectures is None else list(architectures)
    rows = {}
    with _quiet():
        for name in wanted:
            rows[name] = _row(name)
            say(f"{name}: {rows[name]}")
    if architectures is None:
        rows |= {name: {"refused": f"not tried: {why}"} for name, why in sorted(NOT_RUN.items())}
    served = [row for row in rows.values() if "refused" not in row]
    broken = [row for row in served if not (row["exact"] and row["shared"])]
    return {
        "rows": rows,
        "served": len(served),
        "refused": len(rows) - len(served),
        "checks": [
            check(
                "architectures that are served and not exact or not shared", len(broken), 0, "", at_most=True
            )
        ],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """A hundred models warn of the same."""
    log = logging.getLogger("agentmem")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _row(architecture: str) -> dict[str, Any]:
    def model() -> LoadedModel:
        return random_model(architecture, seed=1, **ZOO[architecture])

    with tempfile.TemporaryDirectory(prefix="agentmem-layouts-") as folder:
        try:
            runtime = _opened(Path(folder) / "home", model)
        except AgentMemError as error:
            return {"refused": error.message}
        try:
            anatomy = runtime._engine.runner.feed.anatomy
            kinds = Counter(part.kind for part in anatomy.parts)
            return {
                "kinds": dict(sorted(kinds.items())),
                "exact": _exact(Path(folder), model),
                "batched": runtime._engine.runner.batches,
                "shared": _shared(runtime),
                "composed": _composed(runtime),
                "episodic": _episodic(runtime),
            }
        finally:
            runtime.close()


def _opened(home: Path, model: Callable[[], LoadedModel]) -> Runtime:
    settings = Settings(
        home=home, ram_budget=ByteSize(32 << 20), itl_target_ms=1e6, page_tokens=32, chunk_tokens=128,
        episode_encoder="hash512", compose_budget=ByteSize(64 << 20),
    )  # fmt: skip
    return Runtime.open(settings, model)


def _ask(runtime: Runtime, agent: str, *texts: str) -> Finished:
    """A conversation of the user's messages and the replies to them; the last turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": TEXT}]
    for text in texts:
        messages.append({"role": "user", "content": text})
        done = finished_turn(runtime, agent, messages, 6)
        messages.append({"role": "assistant", "content": done.text})
    return done


def _exact(folder: Path, model: Callable[[], LoadedModel]) -> bool:
    """Whether a second turn says the same hot, from disk and after a restart, and reads no more than what is new."""
    turns = []
    for between in ("nothing", "eviction", "restart"):
        runtime = _opened(folder / between, model)
        messages: list[dict[str, Any]] = [{"role": "user", "content": TEXT}]
        first = finished_turn(runtime, "a", messages, 6)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
        if between == "eviction":
            runtime.evict("a")
        elif between == "restart":
            runtime.close()
            runtime = _opened(folder / between, model)
        turns.append(finished_turn(runtime, "a", messages, 6))
        runtime.close()
    read = [turn.usage["agentmem"]["prefilled_tokens"] for turn in turns]
    return len({turn.text for turn in turns}) == 1 and max(read) < 64


def _shared(runtime: Runtime) -> bool:
    """Whether an agent's prompt goes on from what others with the same beginning have read."""
    _ask(runtime, "a", "who?")
    _ask(runtime, "b", "when, and why?")
    third = _ask(runtime, "c", "what of the sea?")
    return bool(third.usage["prompt_tokens_details"]["cached_tokens"] > 0.5 * third.usage["prompt_tokens"])


def _composed(runtime: Runtime) -> bool:
    """Whether state may be moved behind another text."""
    try:
        runtime.create("mover", {"reuse": "composed"})
    except AgentMemError:
        return False
    say_in_turn(runtime, "mover", f"read this: {TEXT}")
    runtime.create("other", {"reuse": "composed"})
    say_in_turn(runtime, "other", "something else first, and then more")
    usage = say_in_turn(runtime, "other", f"read this: {TEXT}")
    return bool(usage["agentmem"]["composed_tokens"] > 0) or _rotates(runtime)


def _rotates(runtime: Runtime) -> bool:
    made = runtime._engine.composing
    try:
        return bool(runtime._call(lambda: made.rotations))
    except AgentMemError:
        return False


def _episodic(runtime: Runtime) -> bool:
    """Whether a long conversation is folded into a small budget."""
    try:
        policy = {"kind": "episodic", "budget_tokens": BUDGET, "block_tokens": BUDGET, "episodes": 2}
        runtime.create("old", {"memory": policy})
    except AgentMemError:
        return False
    usage: dict[str, Any] = {}
    for number in range(4):
        usage = say_in_turn(runtime, "old", f"{number} {TEXT[:330]}")
        deadline = time.monotonic() + SETTLED_S
        while runtime._call(lambda: runtime._engine.folds.pending or runtime._memory.unwritten):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return bool(usage["agentmem"]["evicted_tokens"] > 0)


def table(result: dict[str, Any]) -> str:
    """Markdown: one line for all model types with the same kinds of layers of which the same works; then what is refused."""
    alike: dict[tuple[str, ...], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, row in result["rows"].items():
        if "refused" in row:
            refused.setdefault(row["refused"], []).append(name)
            continue
        key = (" + ".join(sorted(row["kinds"])), *("yes" if row[f] else "no" for f in FEATURES))
        alike.setdefault(key, []).append(name)
    lines = ["| layers | " + " | ".join(FEATURES) + " | model types |", "|---" * (len(FEATURES) + 2) + "|"]
    lines += [f"| {' | '.join(key)} | {_names(names)} |" for key, names in sorted(alike.items())]
    lines += ["", "| refused, because | model types |", "|---|---|"]
    lines += [f"| {why} | {_names(names)} |" for why, names in sorted(refused.items())]
    return "\n".join(lines)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""What the routes share: the runtime, its settings, its numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from agentmem.api.archive import Archive
from agentmem.api.errors import UnknownModel
from agentmem.api.metrics import Metrics
from agentmem.api.turn import Turn
from agentmem.engine.request import ChatRequest
from agentmem.settings import Settings

if TYPE_CHECKING:
    from agentmem.runtime import Runtime

MODEL_ALIASES = frozenset({"", "agentmem", "default"})


class Service:
    """One served runtime. `started` is in epoch seconds."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime = runtime
        self.settings = settings
        self.started = time.time()
        self.metrics = Metrics(self.gauges)
        self.archive = Archive(runtime, settings.paths.responses)
        self._turns: WeakSet[Turn] = WeakSet()

    def documents(self, namespace: str) -> Callable[[str], str]:
        """Gives the text of a document of a namespace by its name, on any thread but the engine's; raises NotFound."""
        return lambda name: self.runtime.composed.document(namespace, name)

    def begin(self, request: ChatRequest) -> Turn:
        """Submit a turn, from the event loop. Raises what `Runtime.chat` raises."""
        turn = Turn(self.runtime, request, self.metrics)
        self._turns.add(turn)
        return turn

    def wind_up(self) -> None:
        """Cut all turns short, from the event loop: their clients get what there is, and a proper end."""
        for turn in list(self._turns):
            turn.cancel()

    def close(self) -> None:
        """Let go of what is kept for clients."""
        self.archive.close()

    def check_model(self, name: str | None, param: str | None = "model") -> None:
        """Raises UnknownModel unless `name` is the loaded model or a word for it."""
        if name is not None and name not in MODEL_ALIASES and name != self.runtime.model_name:
            raise UnknownModel(
                f"the model {name[:80]!r} is not served here; use {self.runtime.model_name!r} or 'default'",
                param=param,
            )

    def model(self) -> dict[str, Any]:
        """The loaded model as OpenAI lists one."""
        return {
            "id": self.runtime.model_name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "agentmem",
            "max_context": self.runtime.max_context,
        }

    def gauges(self) -> dict[str, int | float]:
        """Numbers of this moment. Blocks."""
        health = self.runtime.health()
        return {
            **flat("store", self.runtime.budgets()),
            **flat("scheduler", health["scheduler"]),
            **flat("memory", health["memory"]),
            **flat("jobs", self.runtime.jobs.counts()),
            "turns_active": health["active"],
            "turns_waiting": health["waiting"],
            "uptime_seconds": time.time() - self.started,
        }


def flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a tree of objects, under joined names."""
    found: dict[str, int | float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(f"{prefix}_{name}", value)
        elif isinstance(value, int | float):
            found[f"{prefix}_{name}"] = value
    return found

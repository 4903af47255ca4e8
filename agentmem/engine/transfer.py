"""Export and import of agents, as the server asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

from agentmem.engine.arrival import Arrival
from agentmem.engine.departure import Departure, Identity, WhenIdle, scratch_file
from agentmem.engine.fetch import Call, Fetch
from agentmem.engine.memory import Memory
from agentmem.engine.recall import Recall
from agentmem.model.identity import text_identity
from agentmem.model.loaded import LoadedModel


class Transfer:
    """Agents out of this home and into it. All methods block; any thread but the engine's may call them."""

    def __init__(
        self,
        call: Call,
        when_idle: WhenIdle,
        memory: Memory,
        recall: Recall,
        model: LoadedModel,
        fingerprint: str,
        check_free: Callable[[str, str], None],
    ) -> None:
        fetch = Fetch(call, memory, recall)
        identity = Identity(fingerprint, text_identity(model.identity), model.name)
        self._folder = memory.store.folder
        self._departure = Departure(call, when_idle, memory, fetch, identity)
        self._arrival = Arrival(call, when_idle, memory, model.tokenizer, fetch, identity, check_free)

    def scratch(self) -> IO[bytes]:
        """A nameless file in the home, for an upload. Raises OSError."""
        return scratch_file(self._folder)

    def export(self, name: str, namespace: str = "default") -> IO[bytes]:
        """See `Departure.export`."""
        return self._departure.export(namespace, name)

    def admit(
        self,
        file: IO[bytes],
        name: str | None = None,
        namespace: str = "default",
        *,
        trust: bool = False,
        force: bool = False,
    ) -> dict[str, Any]:
        """See `Arrival.admit`. The result names the agent too."""
        return self._arrival.admit(file, namespace, name, trust=trust, force=force)

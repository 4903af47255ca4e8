"""Where responses are kept: on disk, but for agents that leave nothing there, or nothing that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentmem.api.kept import Items, Kept, KeptConversation, KeptResponses
from agentmem.errors import NotFound

if TYPE_CHECKING:
    from agentmem.runtime import Runtime


class Archive:
    """Two databases behind one set of methods; see `KeptResponses`. Any thread but the engine's."""

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self._runtime = runtime
        self._disk, self._ram = KeptResponses(path), KeptResponses(None)

    def close(self) -> None:
        self._disk.close()
        self._ram.close()

    def keep(self, response: Kept, given: Items, said: Items) -> None:
        """Add a response where its agent leaves its own words. Raises StoreError."""
        self._for_agent(response.namespace, response.agent).keep(response, given, said)

    def response(self, id_: str, namespace: str) -> Kept:
        """Raises NotFound."""
        return self._holding(id_, namespace).response(id_, namespace)

    def history(self, last: Kept) -> Items:
        """See `KeptResponses.history`. Raises NotFound where a response in between was deleted."""
        return self._holding(last.id, last.namespace).history(last)

    def items(self, owner: str, *, given: bool = False) -> Items:
        """The items of a response or a conversation that is there."""
        return [*self._disk.items(owner, given=given), *self._ram.items(owner, given=given)]

    def delete(self, id_: str, namespace: str) -> None:
        """Raises NotFound."""
        self._holding(id_, namespace).delete(id_, namespace)

    def forget(self, namespace: str, agent: str, session: str | None = None) -> None:
        """Delete all that an agent said, or what it said in one session."""
        for database in (self._disk, self._ram):
            database.forget(namespace, agent, session)

    def begin_conversation(self, one: KeptConversation, items: Items) -> None:
        """A new conversation, on disk."""
        self._disk.begin_conversation(one, items)

    def conversation(self, id_: str, namespace: str) -> KeptConversation:
        """Raises NotFound."""
        return self._disk.conversation(id_, namespace)

    def describe(self, id_: str, metadata: dict[str, str]) -> None:
        """Give a conversation other metadata."""
        self._disk.describe(id_, metadata)

    def add_items(self, id_: str, items: Items) -> None:
        """Add to the end of a conversation."""
        self._disk.add_items(id_, items)

    def delete_item(self, owner: str, id_: str) -> None:
        """Take one item out of a conversation. Raises NotFound."""
        try:
            self._ram.delete_item(owner, id_)
        except NotFound:
            self._disk.delete_item(owner, id_)

    def delete_conversation(self, id_: str) -> None:
        """Delete a conversation; responses that were part of it stay."""
        for database in (self._disk, self._ram):
            database.delete_conversation(id_)

    def _for_agent(self, namespace: str, agent: str) -> KeptResponses:
        try:
            info = self._runtime.agent(agent, namespace)
        except NotFound:
            return self._ram  # it was forgotten meanwhile
        return self._disk if info["persist"] and info["encrypted"] == "off" else self._ram

    def _holding(self, id_: str, namespace: str) -> KeptResponses:
        try:
            self._ram.response(id_, namespace)
        except NotFound:
            return self._disk
        return self._ram

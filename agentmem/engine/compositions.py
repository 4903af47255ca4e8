"""What may be asked of composed reuse, from any thread but the engine's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from agentmem.compose.composer import Composer
from agentmem.compose.ledger import Bounds
from agentmem.compose.policy import Policy
from agentmem.compose.reuse import DEFAULT
from agentmem.engine.composing import Composing
from agentmem.engine.fetch import Call
from agentmem.errors import BadRequest, NotFound
from agentmem.model.chat import ChatTokenizer


class Compositions:
    """Templates and documents that were declared, and calibration. Raises BadRequest where nothing can be composed."""

    def __init__(self, call: Call, composing: Composing, tokenizer: ChatTokenizer) -> None:
        self._call, self._composing, self._tokenizer = call, composing, tokenizer

    def verify(self, namespace: str | None = None, planner: str | None = None) -> dict[str, Any]:
        """Try the last prompts of every template, of all namespaces by default: composed without the anchors of their own texts,
        and read. Waits for the end; runs while nobody else is there. `auto` goes by what is found, for this planner alone.

        Raises BadRequest for a planner that there is not, or not for this model.
        """
        how = Policy("composed", planner or DEFAULT)
        found: Future[list[dict[str, Any]]] = Future()

        def begin(composer: Composer) -> Bounds:
            self._composing.check(how.planner)
            self._composing.trials.calibrate(composer, namespace, how.planner, found.set_result)
            return composer.ledger.bounds

        bounds = self._on(begin)
        return {"templates": found.result(), "bounds": {"pairs": bounds.pairs, "kl": bounds.kl}}

    def templates(self, namespace: str) -> dict[str, str]:
        """Texts by name."""
        return self._on(lambda composer: dict(composer.library.space(namespace).templates))

    def template(self, namespace: str, name: str) -> str:
        """Raises NotFound."""
        templates = self.templates(namespace)
        if name not in templates:
            raise NotFound(f"there is no template {name!r} in namespace {namespace!r}", param="name")
        return templates[name]

    def declare(self, namespace: str, name: str, text: str) -> None:
        """Cut prompts and messages of this text at its {{slots}}. Raises BadRequest for a text without."""
        self._change(lambda composer: composer.library.declare(namespace, name, text))

    def withdraw(self, namespace: str, name: str) -> None:
        """Raises NotFound."""
        self.template(namespace, name)
        self._change(lambda composer: composer.library.space(namespace).templates.pop(name, None))

    def documents(self, namespace: str) -> dict[str, int]:
        """Tokens by name."""
        return self._on(
            lambda composer: {
                d.name: len(d.ids) for d in composer.library.space(namespace).documents.values()
            }
        )

    def document(self, namespace: str, name: str) -> str:
        """The text of a document. Raises NotFound."""
        found = self._on(
            lambda composer: [
                d.ids for d in composer.library.space(namespace).documents.values() if d.name == name
            ]
        )
        if not found:
            raise NotFound(f"there is no document {name[:80]!r} in namespace {namespace!r}", param="name")
        return self._tokenizer.decode(found[0].tolist())

    def register(self, namespace: str, name: str, text: str) -> int:
        """Look for this text in prompts, under a name; returns its tokens. Raises BadRequest for an empty one."""
        ids = self._tokenizer.encode(text)
        if not ids:
            raise BadRequest("a document needs text", param="text")
        self._change(lambda composer: composer.library.register(namespace, name, ids))
        return len(ids)

    def unregister(self, namespace: str, name: str) -> None:
        """Raises NotFound."""
        if name not in self.documents(namespace):
            raise NotFound(f"there is no document {name!r} in namespace {namespace!r}", param="name")
        self._change(lambda composer: composer.library.unregister(namespace, name))

    def _change(self, change: Callable[[Composer], object]) -> None:
        def job(composer: Composer) -> None:
            change(composer)
            self._composing.flush()

        self._on(job)

    def _on(self, job: Callable[[Composer], Any]) -> Any:
        """Run `job` on the engine thread, with the composer."""

        def run() -> Any:
            composer = self._composing.composer
            if isinstance(composer, str):
                raise BadRequest(f"nothing can be composed: {composer}")
            return job(composer)

        return self._call(run)

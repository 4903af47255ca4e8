"""The library on disk: what it holds is kept, what left it is dropped, and after a restart it is the same, bit for bit."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from agentmem.blockpool.keep import Changes, Keep, Kept
from agentmem.blockpool.keepsake import Keepsake, KeepsakeDamaged
from agentmem.compose import frozen
from agentmem.compose.anchors import Anchor
from agentmem.compose.ledger import Entry, Ledger
from agentmem.compose.library import HALF_LIFE, Library, Source
from agentmem.compose.segment import Held, Segment
from agentmem.errors import BadRequest

log = logging.getLogger(__name__)

READERS = 4
Job = Callable[[], None]
Live = tuple[object, Callable[[], Keepsake], float, dict[str, Any]]
"""What tells a kept thing from an older one of its key, how it is frozen, its score, and what may change of it."""


class Keeping:
    """`submit` takes jobs for the thread that writes; what they need of MLX's arrays is copied before. Engine thread only."""

    def __init__(
        self, library: Library, ledger: Ledger, keep: Keep, submit: Callable[[Job], None] = lambda job: job()
    ) -> None:
        self.library, self.ledger, self.keep = library, ledger, keep
        self._submit = submit
        self._kept: dict[str, object] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, str] = {}

    def restore(self) -> None:
        """Fill an empty library with what was kept, the most useful first; what has no room leaves the disk too."""
        anchors, all_kept = [], self.keep.kept()
        with ThreadPoolExecutor(READERS, thread_name_prefix="keep") as readers:
            for kept, found in zip(all_kept, readers.map(self._read, all_kept), strict=True):
                if found is not None and kept.key.startswith("anchor/"):
                    anchors.append((kept, found))
                elif found is not None:
                    self._restore(self._restore_held, kept, found)
        for kept, found in sorted(anchors, key=lambda pair: pair[0].state.get("made", 0)):
            self._restore(self._restore_anchor, kept, found)
        self._restore_notes()
        live = dict(self._live())
        self._kept = {k.key: live[k.key][0] if k.key in live else None for k in self.keep.kept()}
        self._states = {k.key: k.state for k in self.keep.kept()}
        self.flush()

    def _read(self, kept: Kept) -> Keepsake | None:
        try:
            return self.keep.read(kept.key)
        except OSError as e:
            log.warning("a kept segment cannot be read: %s", e)
            return None

    def _restore(self, how: Callable[[Kept, Keepsake], None], kept: Kept, found: Keepsake) -> None:
        """A keepsake whose bytes are right may still be of another release."""
        try:
            how(kept, found)
        except (KeepsakeDamaged, KeyError, TypeError, ValueError, AssertionError) as e:
            log.warning("a kept segment is not used: %s", e)

    def _restore_held(self, kept: Kept, found: Keepsake) -> None:
        namespace = found.about["namespace"]
        if kept.key.startswith("segment/"):
            self.library.adopt(namespace, frozen.thawed_segment(found, kept.state))
        else:
            chain = bytes.fromhex(found.about["chain"])
            self.library.adopt(namespace, frozen.thawed_fixed(found, kept.state), chain)

    def _restore_anchor(self, kept: Kept, found: Keepsake) -> None:
        state = kept.state
        anchor = frozen.thawed_anchor(found, state)
        if self.library.pool.whole and not anchor.whole:
            return  # of a time when anchors were kept in another way; its prompts make it anew
        segment = bytes.fromhex(state["segment"])
        source = Source(segment, set(state["owners"]), set(state["seen_by"]), state["made"], state["used"])
        self.library.adopt_anchor(found.about["slot"], anchor, source)

    def _restore_notes(self) -> None:
        self._notes, entries = self.keep.notes(), dict[tuple[str, bytes], Entry]()
        for key, data in self._notes.items():
            try:
                self._restore_note(key.partition("/")[0], json.loads(data), entries)
            except (KeyError, TypeError, ValueError, BadRequest) as e:
                log.warning("a note of composed reuse is not used: %s", e)
        self.ledger.adopt(entries)

    def _restore_note(
        self, kind: str, value: dict[str, Any], entries: dict[tuple[str, bytes], Entry]
    ) -> None:
        if kind == "document":
            self.library.register(value["namespace"], value["name"], value["ids"])
        elif kind == "template":
            self.library.declare(value["namespace"], value["name"], value["text"])
        elif kind == "ledger":
            entries[value["namespace"], bytes.fromhex(value["template"])] = Entry.of_json(value["entry"])

    def flush(self, everything: bool = False) -> None:
        """Hand what changed to the writer. `everything`: counters that change with every prompt too."""
        changes = self._changes(everything)
        if changes:
            self._submit(partial(self.keep.apply, changes))

    def _changes(self, everything: bool) -> Changes:
        changes = Changes(notes=self._changed_notes())
        live = dict(self._live())
        for key, (mark, freeze, score, state) in live.items():
            fresh = self._kept.get(key) != mark
            if fresh:
                changes.put.append(freeze())
                self._kept[key] = mark
            if fresh or self._differs(key, state, everything):
                changes.states[key] = (score, state)
                self._states[key] = state
        for key in self._kept.keys() - live.keys():
            changes.drop.add(key)
            del self._kept[key]
            self._states.pop(key, None)
        return changes

    def _differs(self, key: str, state: dict[str, Any], everything: bool) -> bool:
        """Whether an owner came or went; counters alone are worth no transaction."""
        old = self._states.get(key, {})
        return old != state if everything else any(old.get(k) != state.get(k) for k in ("owners", "seen_by"))

    def _live(self) -> Iterator[tuple[str, Live]]:
        """Everything that the library holds, by key."""
        for namespace, space in self.library.spaces.items():
            for text, segment in space.segments.items():
                key = f"segment/{namespace}/{text.hex()}"
                yield key, _live(segment, partial(frozen.segment_of, namespace, key, segment))
            for chain, fixed in space.fixed.items():
                key = f"fixed/{namespace}/{chain.hex()}"
                yield key, _live(fixed, partial(frozen.fixed_of, namespace, key, chain, fixed))
        for slot, anchor in self.library.pool.items():
            source = self.library.sources[slot, anchor.text]
            key = f"anchor/{slot}/{anchor.text.hex()}"
            yield key, _live_anchor(anchor, source, partial(frozen.anchor_of, slot, key, anchor))

    def _changed_notes(self) -> dict[str, str | None]:
        notes: dict[str, str | None] = {}
        now = dict(self._said())
        for key, value in now.items():
            if self._notes.get(key) != value:
                notes[key] = value
        for key in self._notes.keys() - now.keys():
            notes[key] = None
        self._notes = now
        self.ledger.changed.clear()
        return notes

    def _said(self) -> Iterator[tuple[str, str]]:
        """Documents, declared templates and the ledger."""
        for namespace, space in self.library.spaces.items():
            for document in space.documents.values():
                said = {"namespace": namespace, "name": document.name, "ids": document.ids.tolist()}
                yield f"document/{namespace}/{document.name}", json.dumps(said)
            for name, text in space.templates.items():
                said = {"namespace": namespace, "name": name, "text": text}
                yield f"template/{namespace}/{name}", json.dumps(said)
        for (namespace, template), entry in self.ledger.entries.items():
            key = f"ledger/{namespace}/{template.hex()}"
            if (namespace, template) in self.ledger.changed or key not in self._notes:
                said = {"namespace": namespace, "template": template.hex(), "entry": entry.json()}
                yield key, json.dumps(said)
            else:
                yield key, self._notes[key]


def _live(held: Held, freeze: Callable[[], Keepsake]) -> Live:
    """Scores are of no clock: that of what is not used stays."""
    score = math.log2(max(held.hits, 1e-9)) + held.used / HALF_LIFE
    state = {"owners": sorted(held.owners), "hits": held.hits, "used": held.used}
    provenance = held.provenance if isinstance(held, Segment) else None
    return (held.mark, provenance), freeze, score, state


def _live_anchor(anchor: Anchor, source: Source, freeze: Callable[[], Keepsake]) -> Live:
    state = {
        "segment": source.segment.hex(),
        "owners": sorted(source.owners),
        "seen_by": sorted(source.seen_by),
        "made": source.made,
        "used": source.used,
        "hits": anchor.hits,
    }
    score = math.log2(1 + anchor.hits) + source.used / HALF_LIFE
    return source.made, freeze, score, state

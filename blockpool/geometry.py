"""Geometry: how rows of every layer are laid out in slots. Sizes are uint32 words unless a name says bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from agentmem.quant.format import KVFormat
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec

WORD = 4


@dataclass(frozen=True)
class Geometry:
    """One slot holds `page_tokens` packed rows of every layer, or `raw_per_slot` raw rows of every layer.

    `key_maps`, one a layer, say how keys are changed before they become rows; by default as the formats say. `latent` layers
    are those that read keys and values whole, in the model's own terms. `carried_words` is what a checkpoint of the layers
    without rows takes, at most.
    """

    codecs: tuple[RowCodec, ...]
    page_tokens: int
    key_maps: tuple[KeyMap, ...] = field(default=(), compare=False)
    carried_words: int = 0
    latent: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.key_maps:
            object.__setattr__(self, "key_maps", tuple(KeyMap(c.format.rotation) for c in self.codecs))

    @property
    def format(self) -> KVFormat:
        """The format that decides which pages are packed: that of a layer that packs, if there is one."""
        return next((c.format for c in self.codecs if c.format.packs), self.codecs[0].format)

    @property
    def layers(self) -> int:
        return len(self.codecs)

    @cached_property
    def packed_words(self) -> tuple[int, ...]:
        return tuple(c.packed_words for c in self.codecs)

    @cached_property
    def raw_words(self) -> tuple[int, ...]:
        return tuple(c.raw_words for c in self.codecs)

    @cached_property
    def slot_words(self) -> tuple[int, ...]:
        return tuple(self.page_tokens * w for w in self.packed_words)

    @cached_property
    def raw_per_slot(self) -> int:
        return min(s // r for s, r in zip(self.slot_words, self.raw_words, strict=True))

    @cached_property
    def slot_bytes(self) -> int:
        return WORD * sum(self.slot_words)

    @cached_property
    def raw_row_bytes(self) -> int:
        """Bytes of one token's state in 16 bits: what an fp16 cache needs."""
        return WORD * sum(self.raw_words)

    @cached_property
    def packed_row_bytes(self) -> int:
        return WORD * sum(self.packed_words)

    def row_bytes(self, raw: bool) -> int:
        """Bytes of one token's rows of every layer."""
        return self.raw_row_bytes if raw else self.packed_row_bytes

    def slots_for(self, raw: bool, rows: int) -> int:
        """Slots that a page of `rows` rows occupies."""
        return -(-rows // self.raw_per_slot) if raw else 1

    def worst_slots(self, tokens: int) -> int:
        """Slots that `tokens` tokens can occupy at most: raw first page, packed pages, raw tail, one page cut short;
        with the checkpoint that they start from, and the one that they end with."""
        pages = -(-tokens // self.page_tokens)
        return (
            pages
            + 1
            + 2 * self.slots_for(True, self.page_tokens)
            + 2 * self.checkpoint_slots(self.carried_words)
        )

    def checkpoint_slots(self, words: int) -> int:
        """Slots that a checkpoint of so many words occupies."""
        return -(-WORD * words // self.slot_bytes)

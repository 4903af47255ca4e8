"""Compaction: which pages at the end of a session are to be written once more, packed and side by side."""

from __future__ import annotations

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, bytes_by_extent

FAN = 4
"""Extents that a merge takes at least."""


def fragments(chain: list[Page], geometry: Geometry) -> list[Page]:
    """Pages of `chain` whose rows are worth writing side by side; empty when there is nothing to gain.

    From the end backwards every extent is taken that is no larger than all behind it. Like a binary counter this merges
    extents of like size: each row is written again about log2(turns / FAN) times, and a chain lies in few extents.

    Where there is nothing to merge, packed pages go whose rows lie raw on disk, because they were the tail of a turn: packing
    them takes longer than reading them, so it must not be left to the restore. All pages must be in RAM.
    """
    sizes = bytes_by_extent(chain, geometry.row_bytes)
    taken: set[int] = set()
    total = 0
    for extent in reversed(sizes):
        if taken and sizes[extent] > total:
            break
        taken.add(extent)
        total += sizes[extent]
    if len(taken) < FAN:
        pages = [p for p in chain if not p.raw and any(x.raw for x in p.pieces or ())]
    else:
        pages = [p for p in chain if any(x.extent in taken for x in p.pieces or ())]
    return pages if all(p.slots is not None and p.id is not None for p in pages) else []

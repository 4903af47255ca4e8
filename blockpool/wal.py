"""SQLite's write-ahead log, read by its own rules and one more.

SQLite stops at the first frame whose checksum is wrong and passes over the rest without a word: after a power cut that is the
unfinished end, after a flipped bit it is acknowledged work. Every frame's sum begins with the sum that the frame before it
stores, so the frames behind a damaged one can still be told from leftovers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import numpy as np

PAGE_SIZE = 4096
FRAME_HEADER = 24
HEADER = 32
MAGIC = (0x377F0682, 0x377F0683)  # sums over little-endian words, over big-endian ones


@dataclass(frozen=True, slots=True)
class Log:
    """The frames of one generation of a log. `sound` and `commits` are per frame: sum as it should be, end of a transaction."""

    numbers: np.ndarray
    pages: np.ndarray
    sound: np.ndarray
    commits: np.ndarray
    header_sound: bool

    @property
    def readable(self) -> int:
        """Frames up to the end of the last transaction that SQLite would read."""
        bad = np.flatnonzero(~self.sound)
        prefix = (int(bad[0]) if bad.size else len(self.sound)) if self.header_sound else 0
        ends = np.flatnonzero(self.commits[:prefix])
        return int(ends[-1]) + 1 if ends.size else 0

    @property
    def written(self) -> int:
        """Frames up to the end of the last transaction of which any sound trace is left."""
        ends = np.flatnonzero(self.commits & self.sound)
        return int(ends[-1]) + 1 if ends.size else 0

    @property
    def damaged(self) -> bool:
        """Whether a finished transaction lies where SQLite does not look."""
        return self.written > self.readable

    def content(self) -> dict[int, bytes]:
        """Pages by number as the last finished transaction left them; damaged ones as they are."""
        n = self.written
        return {
            int(number): page.tobytes() for number, page in zip(self.numbers[:n], self.pages[:n], strict=True)
        }


def read_log(data: bytes) -> Log | None:
    """The log in `data`; None when it holds no frame."""
    frames = (len(data) - HEADER) // (FRAME_HEADER + PAGE_SIZE)
    if frames < 1:
        return None
    raw = np.frombuffer(data, np.uint8, frames * (FRAME_HEADER + PAGE_SIZE), HEADER).reshape(frames, -1)
    heads = np.ascontiguousarray(raw[:, :FRAME_HEADER]).view(">u4").astype(np.uint32)
    magic, _, page_size = struct.unpack_from(">3I", data)
    order = ">" if magic == MAGIC[1] else "<"
    start = _sums(np.frombuffer(data, np.uint8, 24).reshape(1, -1), np.zeros((1, 2), np.uint32), order)[0]
    header_sound = (
        magic in MAGIC and page_size == PAGE_SIZE and tuple(start) == struct.unpack_from(">2I", data, 24)
    )
    salts = np.array(struct.unpack_from(">2I", data, 16), np.uint32) if header_sound else heads[0, 2:4]
    same = (heads[:, 2:4] == salts).all(axis=1)
    live = int(np.argmin(same)) if not same.all() else frames
    live = _with_damaged_salts(same, live)
    before = np.vstack([start[None], heads[: live - 1, 4:6]]) if live else np.zeros((0, 2), np.uint32)
    summed = np.hstack([raw[:live, :8], raw[:live, FRAME_HEADER:]])
    sound = (_sums(summed, before, order) == heads[:live, 4:6]).all(axis=1) & same[:live]
    return Log(heads[:live, 0], raw[:live, FRAME_HEADER:], sound, heads[:live, 1] > 0, header_sound)


def _with_damaged_salts(same: np.ndarray, live: int) -> int:
    """Frames of this generation, those between others of it whose salt is damaged counted in."""
    later = np.flatnonzero(same[live:])
    return live + int(later[-1]) + 1 if later.size else live


def _sums(data: np.ndarray, before: np.ndarray, order: str) -> np.ndarray:
    """SQLite's checksum of each row of bytes, uint32 [rows, 2], going on from `before`.

    a += x + b; b += y + a for every pair (x, y) of words: linear, so each pair has a fixed weight in the end.
    """
    words = np.ascontiguousarray(data).view(f"{order}u4").astype(np.uint32)
    x, y = words[:, 0::2], words[:, 1::2]
    weights, whole = _weights(x.shape[1])
    with np.errstate(over="ignore"):
        a = (x * weights[0, 0] + (x + y) * weights[0, 1]).sum(axis=1, dtype=np.uint32)
        b = (x * weights[1, 0] + (x + y) * weights[1, 1]).sum(axis=1, dtype=np.uint32)
        a += before[:, 0] * whole[0, 0] + before[:, 1] * whole[0, 1]
        b += before[:, 0] * whole[1, 0] + before[:, 1] * whole[1, 1]
    return np.stack([a, b], axis=1)


@cache
def _weights(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights uint32 [2, 2, pairs], weight of the start [2, 2]): powers of the step's matrix, modulo 2**32."""
    step = [[1, 1], [1, 2]]
    power = [[1, 0], [0, 1]]
    columns = np.zeros((2, 2, pairs), np.uint32)
    for i in reversed(range(pairs)):
        columns[:, :, i] = power
        power = [
            [sum(power[r][k] * step[k][c] for k in range(2)) % (1 << 32) for c in range(2)] for r in range(2)
        ]
    return columns, np.array(power, np.uint32)

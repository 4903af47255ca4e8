"""SQLite's write-ahead log, read by its own rules and one more.

SQLite stops at the first frame whose checksum is wrong and passes over the rest without a word: after a power cut that is the
unfinished end, after a flipped bit it is acknowledged work. Every frame's sum begins with the sum that the frame before it
stores, so the frames behind a damaged one can still be told from leftovers. The sum is linear: it tells whether a single bit
has flipped, mostly which, and so a damaged last frame from one that was never finished.
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
    """The frames of one generation of a log, flipped bits set right where it is known which.

    Per frame: `sound`, its sum is as it should be; `mended`, it was but for one bit; `commits`, it ends a transaction.
    """

    numbers: np.ndarray
    pages: np.ndarray
    sound: np.ndarray
    mended: np.ndarray
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
        ends = np.flatnonzero(self.commits & (self.sound | self.mended))
        return int(ends[-1]) + 1 if ends.size else 0

    @property
    def damaged(self) -> bool:
        """Whether a finished transaction lies where SQLite does not look."""
        return self.written > self.readable

    def content(self) -> dict[int, bytes]:
        """Pages by number as the last finished transaction left them; those that cannot be mended as they are."""
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
    live = min(_last_of(same) + 2, frames)  # one more: its salt may be what is damaged
    before = np.vstack([start[None], heads[: live - 1, 4:6]])
    summed = np.hstack([raw[:live, :8], raw[:live, FRAME_HEADER:]])
    sums, stored = _sums(summed, before, order), heads[:live, 4:6]
    right = (sums == stored).all(axis=1)
    sound, mended = right & same[:live], np.zeros(live, bool)
    for i in np.flatnonzero(~sound):
        if not same[i]:
            mended[i] = right[i] and _bits(heads[i, 2:4], salts) == 1
        elif i and (_sums(summed[i : i + 1], sums[i - 1 : i], order) == stored[i]).all():
            mended[i] = True  # what is damaged is the sum that the frame before it stores
        elif (whole := _mend(summed[i], before[i], stored[i], order)) is not None:
            summed[i], mended[i] = whole, True
    fields = np.ascontiguousarray(summed[:, :8]).view(">u4")
    return Log(fields[:, 0], summed[:, 8:], sound, mended, fields[:, 1] > 0, header_sound)


def _last_of(same: np.ndarray) -> int:
    """The last frame of this generation; what lies behind the log's end is older."""
    found = np.flatnonzero(same)
    return int(found[-1]) if found.size else -1


def _bits(a: np.ndarray, b: np.ndarray) -> int:
    """How many bits differ."""
    return sum(int(x).bit_count() for x in a ^ b)


def _mend(data: np.ndarray, before: np.ndarray, stored: np.ndarray, order: str) -> np.ndarray | None:
    """`data` as it was before one bit flipped in it or in its stored sum; None when no single bit explains the sum.

    The upper bits of a word leave little trace in the sum. Where several bits explain it, the data comes back as it is.
    """
    got = _sums(data[None], before[None], order)[0]
    words = np.ascontiguousarray(data).view(f"{order}u4").astype(np.uint32)
    weights, _ = _weights(len(words) // 2)
    each = np.empty((2, len(words)), np.uint32)
    each[:, 0::2], each[:, 1::2] = weights[:, 0] + weights[:, 1], weights[:, 1]
    missing = stored - got
    found = []
    for bit in range(32):
        change = np.where(words >> bit & 1, np.uint32((1 << 32) - (1 << bit)), np.uint32(1 << bit))
        fits = np.flatnonzero((change * each == missing[:, None]).all(axis=0))
        found += [(int(word), bit) for word in fits]
    in_sum = _bits(got, stored) == 1
    if len(found) == 1 and not in_sum:
        ((word, bit),) = found
        words[word] ^= np.uint32(1 << bit)
        return words.astype(f"{order}u4").view(np.uint8)
    return data if found or in_sum else None


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

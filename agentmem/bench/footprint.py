"""`bench bytes`: what an agent takes, by model shape and length of its context, and how many fit into a budget.

Computed from the shapes, and held against what is allocated in RAM and lies in files when an agent of that shape is written:
its rows are random and no model runs; tables, pages, windows, checkpoints and commits are the engine's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.bandwidth import drain
from agentmem.bench.checks import check
from agentmem.blockpool.geometry import WORD, Geometry
from agentmem.blockpool.index import TurnRow
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.carry import Baggage, Carry
from agentmem.engine.checkpoints import Checkpoints
from agentmem.engine.layout import part_format
from agentmem.engine.memory import Memory
from agentmem.engine.packing import GivenRows
from agentmem.engine.table import Table
from agentmem.engine.windows import WindowLayer, WindowState
from agentmem.model.anatomy import Part
from agentmem.model.random import byte_tokenizer
from agentmem.quant.attention import reference_path
from agentmem.quant.calibration import spare_layers, wide_format
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec

PAGE, CHUNK = 64, 512
PAPER_BYTES = 0.5625
"""Of an element in plain 4 bits with a scale and a bias for 64: what the paper stores of every token in every layer."""
BUDGET = 8 << 30
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Shape:
    """`expanded`: elements of a token and layer before a latent is formed, as the paper and stock mlx-lm keep them."""

    parts: tuple[Part, ...]
    expanded: int

    def stock_bytes(self, tokens: int) -> int:
        """mlx-lm's caches of 16 bits; windows keep their length only."""
        return sum(2 * self.expanded * min(tokens, p.window or tokens) for p in self.parts)

    def paper_bytes(self, tokens: int) -> int:
        return round(PAPER_BYTES * self.expanded * tokens * len(self.parts))


def _full(layers: int, heads: int, dim: int) -> Shape:
    return Shape((Part("full", LayerShape(heads, dim, dim)),) * layers, 2 * heads * dim)


def _gemma(layers: int, heads: int, dim: int, window: int, pattern: int) -> Shape:
    shape = LayerShape(heads, dim, dim)
    parts = tuple(
        Part("full", shape) if i % pattern == pattern - 1 else Part("window", shape, window=window)
        for i in range(layers)
    )
    return Shape(parts, 2 * heads * dim)


SHAPES = {
    "Llama-3.1-8B": _full(32, 8, 128),
    "Qwen3-8B": _full(36, 8, 128),
    "Qwen3-30B-A3B": _full(48, 4, 128),
    "Gemma-3-12B": _gemma(48, 8, 256, 1024, 6),
    "DeepSeek-V2-Lite": Shape((Part("latent", LayerShape(1, 512, 64)),) * 27, 16 * (192 + 128)),
}
BOUNDS = {("Gemma-3-12B", 8192): 0.30, ("Gemma-3-12B", 32768): 0.22, ("DeepSeek-V2-Lite", 8192): 0.15}


class Agent:
    """An agent of a shape, written turn by turn into a store of its own."""

    def __init__(self, folder: Path, shape: Shape, format: str, tokens: int) -> None:
        codecs = [RowCodec(p.shape, part_format(kv_format(format), p), mx.float16) for p in shape.parts]
        for kind in ("full", "window"):
            same = [i for i, p in enumerate(shape.parts) if p.kind == kind]
            for n in spare_layers([codecs[i] for i in same], [0.0] * len(same)) if same else ():
                codec = codecs[same[n]]
                codecs[same[n]] = replace(codec, format=wide_format(codec.format, codec.format.spare_bits))
        plain = KeyMap()
        carried = [
            WindowLayer(c, plain, p.window, PAGE)
            for c, p in zip(codecs, shape.parts, strict=True) if p.kind == "window"
        ]  # fmt: skip
        paged = tuple(c for c, p in zip(codecs, shape.parts, strict=True) if not p.carried)
        self.baggage = Baggage(tuple(carried), PAGE) if carried else None
        words = self.baggage.most_words() if self.baggage is not None else 0
        self.geometry = Geometry(paged, PAGE, (plain,) * len(paged), carried_words=words)
        slots = self.geometry.worst_slots(tokens)
        self.pool = Pool(self.geometry, slots * self.geometry.slot_bytes, "bytes")
        self.store = Store(folder, "bytes", durable=False)
        self.memory = Memory(self.store, self.pool, byte_tokenizer())
        self.memory.load()
        self._tokens = tokens

    def computed(self) -> int:
        """Bytes of rows that the shape and the format call for: first page, packed pages, tail, windows."""
        g, n = self.geometry, self._tokens
        raw = min(PAGE, n) + (n - PAGE) % PAGE if n > PAGE else n
        rows = raw * g.raw_row_bytes + (n - raw) * g.packed_row_bytes
        return rows + WORD * (self.baggage.words(n) if self.baggage is not None else 0)

    def write(self) -> tuple[int, int]:
        """One turn over all tokens; (bytes of slots in use, bytes of files)."""
        rng = np.random.default_rng(0)
        agent, session = self.memory.open("default", "agent", "default")
        table = Table(self.pool, reference_path)
        ids = rng.integers(0, 50_000, self._tokens).astype(np.int32)
        table.carry = Carry(self.baggage) if self.baggage is not None else None
        for at in range(0, self._tokens, CHUNK):
            self._absorb(table, ids[at : at + CHUNK].tolist(), rng)
        carry, head = table.carry, table.settle(self.pool.tree(agent.row.space).root)
        turn = TurnRow(1, 0, 0, ids, [], [], {}, 0.0)
        self.memory.finish(agent, session, turn, head, lambda *_: None)
        if carry is not None and self.baggage is not None:
            Checkpoints(self.memory, self.pool, self.baggage).keep(
                agent, session, head, carry, lambda *_: None
            )
        drain(self.pool, self.store, lambda: not self.memory.unwritten)
        files = sum(p.stat().st_size for p in self.store.extents.iterdir())
        used = self.pool.used_bytes
        self.store.close()
        return used, files

    def _absorb(self, table: Table, ids: list[int], rng: np.random.Generator) -> None:
        """Rows of `ids`, the same random ones in all layers of a shape."""
        made: dict[int, mx.array] = {}

        def rows(words: int) -> mx.array:
            if words not in made:
                numbers = rng.standard_normal((len(ids), 2 * words), dtype=np.float32)
                made[words] = mx.array(numbers.astype(np.float16).view(np.uint32))
            return made[words]

        arrays, apply = table.absorb([GivenRows(rows(w)) for w in self.geometry.raw_words], ids)
        mx.eval(arrays)
        apply()
        if table.carry is not None:
            states = []
            for state in table.carry.states:
                assert isinstance(state, WindowState)
                states.append(state.after(rows(state.layer.codec.raw_words), len(ids)))
                mx.eval(states[-1].arrays())
            table.carry.move(tuple(states), len(ids))


def measure(
    names: Sequence[str], lengths: Sequence[int], *, written: Sequence[int], format: str = "q4",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Bytes of an agent by shape and length; those of `written` lengths are written, too."""
    rows = [_row(name, tokens, tokens in written, format, say) for name in names for tokens in lengths]
    return {"format": format, "budget_bytes": BUDGET, "rows": rows, "checks": checks(rows)}


def _row(name: str, tokens: int, write: bool, format: str, say: Callable[[str], None]) -> dict[str, Any]:
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="agentmem-bytes-") as folder:
        agent = Agent(Path(folder), shape, format, tokens)
        computed = agent.computed()
        ram, files = agent.write() if write else (None, None)
    paper, stock = shape.paper_bytes(tokens), shape.stock_bytes(tokens)
    say(f"{name} {tokens}: {computed} computed, {files} in files")
    return {
        "shape": name, "tokens": tokens, "bytes": computed, "file_bytes": files, "ram_bytes": ram, "paper_bytes": paper,
        "stock_bytes": stock, "of_paper": (files or computed) / paper, "agents": BUDGET // computed,
        "agents_paper": BUDGET // paper, "agents_stock": BUDGET // stock,
    }  # fmt: skip


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bounds on files; and files are what was computed, give or take headers and stripes."""
    found = []
    for row in rows:
        bound = BOUNDS.get((row["shape"], row["tokens"]))
        if bound is not None and row["file_bytes"] is not None:
            found.append(
                check(
                    f"{row['shape']}, {row['tokens']} tokens: files / the paper's",
                    row["of_paper"],
                    bound,
                    "ratio",
                    True,
                )
            )
        if row["file_bytes"] is not None:
            share = row["file_bytes"] / row["bytes"]
            found.append(
                check(f"{row['shape']}, {row['tokens']} tokens: files / computed", share, 1.02, "ratio", True)
            )
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: MB of an agent, and how many fit."""
    gib = result["budget_bytes"] >> 30
    lines = [
        f"| shape | tokens | MB | MB in files | of the paper's | agents in {gib} GiB | the paper's | stock, 16 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        files = f"{r['file_bytes'] / 1e6:.1f}" if r["file_bytes"] is not None else ""
        counts = f"{r['agents']} | {r['agents_paper']} | {r['agents_stock']}"
        lines.append(
            f"| {r['shape']} | {r['tokens']} | {r['bytes'] / 1e6:.1f} | {files} | {r['of_paper']:.3f} | {counts} |"
        )
    return "\n".join(lines)

"""Views that are chosen among the pool's pages are those that the specification chooses among rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.folding import Folding
from agentmem.episode.rows import PackedHeads
from agentmem.episode.store import Page, PageStore
from agentmem.episode.views import materialised, store_scores, view_of
from agentmem.runtime import Runtime
from tests.engine.turns import words
from tests.runtime.agents import open_runtime, turn

SINKS, KEEP = 4, 256


def chosen(
    runtime: Runtime, pages: list[Any], prompt: list[int], block: int
) -> tuple[Folding, list[mx.array]]:
    fold = Folding(
        runtime._pool, runtime._engine.runner.network, pages[0], SINKS, [], pages, prompt, keep=KEEP, block=block
    )  # fmt: skip
    over = False
    while not over:
        fold.wanted()
        over = fold.step()
    return fold, [
        mx.concatenate([page[layer] for page in fold._words])
        for layer in range(runtime._pool.geometry.layers)
    ]


def by_the_book(runtime: Runtime, pages: list[Any], prompt: list[int]) -> list[mx.array]:
    """All rows scored by the whole prompt at once."""
    pool, network = runtime._pool, runtime._engine.runner.network
    g = pool.geometry

    def rows(layer: int) -> list[Page]:
        arena = pool.arena
        return [
            Page(arena.raw(layer, mx.array(p.slots), p.rows), True) if p.raw
            else Page(arena.packed(layer, mx.array(p.slots))[: p.rows], False)
            for p in pages
        ]  # fmt: skip

    store = PageStore(g.codecs, g.key_maps, rows, pages[-1].end, SINKS)
    view = view_of(store, store_scores(network, store, prompt), [KEEP + SINKS] * g.layers)
    held = materialised(network, store, view, mx.float32)
    out = []
    for line, codec in zip(held.lines, g.codecs, strict=True):
        body = line.body.reshape(line.heads, KEEP, -1)
        kind = line.kind.body
        if isinstance(kind, PackedHeads):
            out.append(kind.joined(body))
        else:
            out.append(codec.raw(*kind.parts(body, codec.stored)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("format", ["q4", "q4-plain", "fp16"])
def test_a_view_of_pages_is_the_view_of_their_rows(tmp_path: Path, format: str) -> None:
    runtime = open_runtime(tmp_path, kv_format=format, ram_budget=32 << 20)
    try:
        for seed in range(6):
            turn(runtime, "ada", words(random.Random(seed), 25), max_tokens=4)
        prompt = list(range(40, 90))

        def compare() -> None:
            head = runtime._memory.find("default", "ada").sessions["default"].head
            assert head is not None
            pages = head.chain()[:-1]
            assert pages[-1].end > 2 * KEEP
            _, at_once = chosen(runtime, pages, prompt, 1 << 20)
            for got, want in zip(at_once, by_the_book(runtime, pages, prompt), strict=True):
                assert np.array_equal(np.array(got), np.array(want))
            fold, by_blocks = chosen(runtime, pages, prompt, KEEP)
            assert [w.shape for w in by_blocks] == [w.shape for w in at_once]
            last = fold.place(7)
            view = last.chain()
            assert all(page.veiled for page in view)
            assert sum(page.rows for page in view) == KEEP
            for layer, want in enumerate(by_blocks):
                assert np.array_equal(
                    np.concatenate([np.array(fold._rows(layer, p)) for p in view]), np.array(want)
                )
            for page in reversed(view):
                runtime._pool.discard(page)

        runtime._call(compare)
    finally:
        runtime.close()

"""A cache of fewer rows than tokens: what is kept is as it was, where it was, and nothing else is seen."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.episode.held import Held
from agentmem.episode.passes import Pass
from agentmem.episode.rows import PackedHeads
from agentmem.episode.selection import Heads
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec
from tests.episode.state import BOTH, World, same, text, world_of

SEEN = text(80)
PROMPT = text(16, seed=1)
NEXT = text(12, seed=2)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize("name", ["q4-plain", "q3", "k8v4-plain", "q8-plain"])
@pytest.mark.parametrize("shape", [LayerShape(2, 64, 64), LayerShape(3, 128, 64), LayerShape(1, 32, 96)])
def test_packed_rows_are_cut_into_heads_and_joined_bit_for_bit(name: str, shape: LayerShape) -> None:
    codec = RowCodec(shape, kv_format(name).for_shape(shape), mx.float16)
    heads, draw = PackedHeads(codec), np.random.default_rng(4)
    keys, values = (
        mx.array(draw.normal(size=(shape.heads, 11, d)), dtype=mx.float32)
        for d in (shape.key_dim, shape.value_dim)
    )
    packed = codec.pack(codec.raw(keys, values))
    rows = heads.split(packed)
    assert mx.array_equal(heads.joined(rows), packed)
    for got, want in zip(heads.parts(rows, mx.float32), codec.unpack(packed, mx.float32), strict=True):
        assert mx.array_equal(got, want)
    at = mx.array([7, 0, 3])
    for got, want in zip(heads.parts(rows[:, at], mx.float32), codec.unpack(packed, mx.float32), strict=True):
        assert mx.array_equal(got, want[:, at])


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("piece", [1, 7, 512])
def test_without_eviction_it_is_a_cache_like_any_other(world: World, sinks: int, piece: int) -> None:
    held = world.held(sinks=sinks)
    got = held.absorb(SEEN[:30], piece=piece, logits=True)
    assert got is not None
    assert apart(got, world.logits(SEEN[:30])[-1]) < 1e-3
    assert held.tokens == 30
    assert [line.per_head for line in held.lines] == [[30, 30]] * 3


class Hidden(Pass):
    """A full cache of which every head sees some rows alone."""

    def __init__(self, held: Held, layer: int, visible: np.ndarray) -> None:
        super().__init__(lambda: held.lines[layer], held.tokens)
        self._visible = visible

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, **options: object
    ) -> mx.array:  # fmt: skip
        line, n = self._fetch(), queries.shape[2]
        old_keys, old_values, _ = line.past(keys.dtype)
        before = np.repeat(self._visible, queries.shape[1] // line.heads, axis=0)[:, None].repeat(n, axis=1)
        own = np.broadcast_to(np.tril(np.ones((n, n), bool)), (len(before), n, n))
        return mx.fast.scaled_dot_product_attention(
            line.kind.key_map.queries(queries), mx.concatenate([old_keys[None], line.kind.key_map.keys(keys)], axis=2),
            mx.concatenate([old_values[None], values], axis=2), scale=options["scale"],
            mask=mx.array(np.concatenate([before, own], axis=2))[None],
        )  # fmt: skip


@pytest.mark.parametrize("heads", BOTH)
@pytest.mark.parametrize("format", ["whole", "q4-plain", "q4-rotated"])
def test_what_was_evicted_is_as_if_masked_in_the_full_cache(world: World, heads: Heads, format: str) -> None:
    full = world.read(SEEN, format)
    held = full.copy()
    held.evict(held.score(PROMPT), [24, 30, 36], heads)
    passes = []
    for layer, line in enumerate(held.lines):
        visible = np.zeros((line.heads, len(SEEN)), bool)
        visible[:, :4] = True
        for head, positions in enumerate(line.candidate_positions()):
            visible[head, positions] = True
        assert visible.sum() == line.heads * [24, 30, 36][layer]
        passes.append(Hidden(full, layer, visible))
    wanted = world.network.logits(mx.array([NEXT]), passes, range(len(NEXT)))
    assert apart(held.predictions([NEXT]), wanted) < 1e-3
    got = held.absorb(NEXT, logits=True)
    assert got is not None
    assert apart(got, wanted[-1]) < 1e-3
    assert held.tokens == len(SEEN) + len(NEXT)


@pytest.mark.parametrize("heads", BOTH)
def test_eviction_counts_keeps_the_sinks_and_the_order(world: World, heads: Heads) -> None:
    held = world.read(SEEN)
    leads = [mx.array(line.lead) for line in held.lines]
    held.evict(held.score(PROMPT), [10, 20, 30], heads)
    assert held.most_rows() == [10, 20, 30]
    for line, lead in zip(held.lines, leads, strict=True):
        assert mx.array_equal(line.lead, lead)
        for positions in line.candidate_positions():
            assert (np.diff(positions) > 0).all()
            assert positions.min(initial=4) >= 4
        if heads is Heads.UNIFORM:
            assert len(set(line.counts.tolist())) == 1
    if heads is Heads.RAGGED:
        assert any(len(set(line.counts.tolist())) > 1 for line in held.lines)


@pytest.mark.parametrize("format", ["whole", "q4-plain", "fp16"])
@pytest.mark.parametrize("heads", BOTH)
def test_rows_move_as_they_are(world: World, format: str, heads: Heads) -> None:
    """Twice evicted, every row still has the bits it had when its token was read."""
    held = world.read(SEEN, format)
    first = [line.tail for line in held.lines]
    for keep in (40, 20):
        held.evict(held.score(PROMPT), [keep] * 3, heads)
    for line, rows in zip(held.lines, first, strict=True):
        of_head = np.repeat(np.arange(line.heads), line.counts)
        assert mx.array_equal(line.body, rows[mx.array(of_head), mx.array(line.positions - 4)])


@pytest.mark.parametrize("format", ["whole", "q4-plain", "fp16"])
@pytest.mark.parametrize("heads", BOTH)
def test_a_checkpoint_is_the_cache_bit_for_bit(world: World, format: str, heads: Heads) -> None:
    held = world.read(SEEN, format)
    held.evict(held.score(PROMPT), [30] * 3, heads)
    held.absorb(NEXT)
    arrays, meta = held.arrays()
    again = Held.of_arrays(world.network, world.kinds[format], world.model.dtype, arrays, meta)
    assert same(held, again)
    assert mx.array_equal(held.predictions([NEXT]), again.predictions([NEXT]))
    with pytest.raises(ValueError, match="layers"):
        Held.of_arrays(world.network, world.kinds[format][:2], world.model.dtype, arrays, meta)


def test_the_last_tokens_can_be_forgotten(world: World) -> None:
    held = world.read(SEEN)
    held.evict(held.score(PROMPT), [30] * 3)
    before = held.copy()
    held.absorb(NEXT)
    held.drop(len(NEXT))
    assert same(held, before)


def test_predictions_of_many_texts_are_those_of_each(world: World) -> None:
    held = world.read(SEEN)
    held.evict(held.score(PROMPT), [30] * 3, Heads.RAGGED)
    texts = [NEXT, NEXT[:5], PROMPT]
    together = held.predictions(texts).reshape(3, 16, -1)
    for got, text_ids in zip(together, texts, strict=True):
        assert apart(got[: len(text_ids)], held.predictions([text_ids])) < 1e-3

"""The laws of small budgets on a real model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.bench.dialogues import generated
from agentmem.bench.episodic import Contest, Ground, Setting
from agentmem.episode.baselines import Prompted
from agentmem.episode.budgets import allotted
from agentmem.episode.build import Builder, Plan
from agentmem.episode.hashed import HashedEncoder
from agentmem.episode.selection import Heads
from agentmem.episode.sensitivity import sensitivity
from agentmem.home import default_home
from agentmem.model.loaded import load

pytestmark = pytest.mark.slow(minutes=1.5)
SETTING = Setting((), 3, None, 2, 8, 256, Heads.RAGGED, "q4-plain", 400)


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground(load("embedded", default_home()), HashedEncoder(), "q4-plain", None)


def test_a_budget_of_the_whole_history_says_what_the_full_cache_says(ground: Ground) -> None:
    ids = ground.frame.history(generated(3, topics=2, utterances=6).text)
    plan = Plan((len(ids),) * len(ground.whole), 128, Heads.RAGGED)
    held = Builder(
        ground.network,
        ground.whole,
        ground.dtype,
        ids[:-1],
        Prompted(tuple(ids[:20])),
        plan,
        max_context=8192,
    ).run()
    got = held.absorb(ids[-1:], logits=True)
    wanted = ground.model.model(mx.array([ids]))[0, -1]
    assert got is not None
    assert mx.abs(got - wanted).max() < 1e-3


def test_the_first_layer_knows_no_context_and_the_others_do(ground: Ground) -> None:
    ids = ground.frame.history(generated(3, topics=2, utterances=8).text)
    got = sensitivity(ground.network, [k.shape for k in ground.whole], ground.dtype, ids, block=64, sinks=8)
    assert got[0] < 1e-6
    assert min(got[1:]) > 1e-4
    budgets = allotted(got, 64)
    assert sum(budgets) == 64 * len(got)
    assert budgets[0] == min(budgets) == 16


def test_the_right_rows_say_more_than_the_newest(ground: Ground) -> None:
    """Of a quarter of the rows, those that an episode's prompt looks at leave answers nearer to the full cache's."""
    contest = Contest(ground, generated(3, topics=3, utterances=8), SETTING)
    views = [r.kl for r in contest.measured("views", 4) if r.policy == "views"]
    newest = [r.kl for r in contest.measured("streaming", 4)]
    assert np.mean(views) < np.mean(newest)

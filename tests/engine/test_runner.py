"""Decode steps that are built before the tokens of the step before are known."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agentmem.engine.reply import Reply
from agentmem.engine.request import ChatRequest, Sampling, Ticket
from agentmem.engine.runner import Runner
from agentmem.engine.sampler import Sampler
from agentmem.engine.sequence import Sequence
from agentmem.model.random import random_model
from tests.engine.test_batch import PAGE, Bench

TOKENS = 3 * PAGE


class Crowd:
    """Sequences over prompts of random lengths that decode through one runner."""

    def __init__(self, bench: Bench, looks_ahead: bool, samplings: list[Sampling]) -> None:
        self.runner = Runner(bench.model, bench.anatomy, bench.plans is not None, looks_ahead)
        rng = random.Random(11)
        prompts = [[rng.randrange(250) for _ in range(rng.randrange(1, 2 * PAGE))] for _ in samplings]
        self.sequences = [
            self._sequence(bench, prompt, s) for prompt, s in zip(prompts, samplings, strict=True)
        ]

    @staticmethod
    def _sequence(bench: Bench, prompt: list[int], sampling: Sampling) -> Sequence:
        request = ChatRequest("a", [{"role": "user", "content": "."}], sampling=sampling)
        return Sequence(
            request, Ticket(), lambda _: None, phase="decode", ids=prompt, table=bench.prefilled(prompt), last=7,
            reply=Reply(bench.model.tokenizer.detokenizer(), []), sampler=Sampler(sampling, 0, prompt),
            max_tokens=TOKENS,
        )  # fmt: skip

    def step(self, members: list[int]) -> list[int]:
        """One step of `members`; returns which of them have a token from it."""
        sequences = [self.sequences[i] for i in members]
        for sequence in sequences:
            assert sequence.table is not None
            sequence.table.reserve()
        fed = []
        for sequence, chosen in self.runner.decode(sequences):
            assert not isinstance(chosen, Exception)
            sequence.take(chosen[0].token, chosen[0].logprob, ())
            fed.append(self.sequences.index(sequence))
        return fed

    def said(self) -> list[list[int]]:
        out = [s.reply.tokens if s.reply is not None else [] for s in self.sequences]
        for sequence in self.sequences:
            assert sequence.table is not None
            sequence.table.release()
        return out


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=4),
    Sampling(logit_bias={9: 3.0}),
    Sampling(top_k=5, seed=1),
]


@pytest.fixture
def bench() -> Bench:
    return Bench(random_model("llama", seed=1))


def test_tokens_are_those_of_steps_one_after_the_other(bench: Bench) -> None:
    """Whoever joins, pauses or leaves between the steps. A page that fills is packed before anything is built on it."""
    plain = Crowd(bench, False, SAMPLINGS)
    while any(s.position < TOKENS for s in plain.sequences):
        plain.step([i for i, s in enumerate(plain.sequences) if s.position < TOKENS])
    want = plain.said()
    crowd, rng, ahead = Crowd(bench, True, SAMPLINGS), random.Random(3), 0
    while any(s.position < TOKENS for s in crowd.sequences):
        left = [i for i, s in enumerate(crowd.sequences) if s.position < TOKENS]
        for _ in range(rng.randrange(1, 9)):
            members = rng.sample(left, rng.randint(1, len(left)))
            if all(crowd.sequences[i].position < TOKENS for i in members):
                crowd.step(members)
                ahead += crowd.runner._ahead is not None
    assert crowd.said() == want
    assert ahead > TOKENS / 4
    bench.pool.check()


def test_who_joins_has_its_first_step_after_the_one_on_its_way(bench: Bench) -> None:
    crowd = Crowd(bench, True, SAMPLINGS[:2])
    for sequence in crowd.sequences:
        assert sequence.table is not None
        sequence.table.cut(1)
    assert crowd.step([0]) == [0]
    assert crowd.step([0, 1]) == [0]
    assert crowd.step([0, 1]) == [0, 1]
    crowd.said()


def test_a_penalty_waits_for_what_was_said(bench: Bench) -> None:
    """It is applied to the token before, not to the one before that."""
    samplings = [Sampling(repetition_penalty=1.3), Sampling(frequency_penalty=0.7)]
    said: dict[bool, Any] = {}
    for looks_ahead in (False, True):
        crowd = Crowd(bench, looks_ahead, samplings)
        for _ in range(20):
            assert crowd.step([0, 1]) == [0, 1]
            assert crowd.runner._ahead is None
        said[looks_ahead] = crowd.said()
    assert said[True] == said[False]
    assert len(set(said[True][0])) == 20


def test_a_step_that_cannot_be_built_ahead_fails_in_its_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(bench, True, SAMPLINGS[:1])
    (sequence,) = crowd.sequences
    assert sequence.table is not None
    sequence.table.cut(1)
    launch, calls = Runner._launch, list[int]()

    def broken(self: Runner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no memory")
        return launch(self, *args)

    monkeypatch.setattr(Runner, "_launch", broken)
    assert crowd.step([0]) == [0]
    with pytest.raises(RuntimeError, match="no memory"):
        crowd.step([0])
    assert len(sequence.table) == 2
    crowd.said()

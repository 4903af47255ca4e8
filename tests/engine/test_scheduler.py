"""What a step is made of, over machines and loads that exist in the test alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.engine.pace import Pace
from agentmem.engine.scheduler import ADMISSION_PATIENCE, GRAIN, PREFILL_PATIENCE, Scheduler, Step

CHUNK = 256
TARGET = 100.0


@dataclass(eq=False)
class Prompt:
    """A request of a machine without a model."""

    agent_key: str
    arrived: float
    remaining: int
    history: int = 0
    reply: int = 0


class Machine:
    """Runs what is planned at a speed that it was made with, and tells the pace how long that took."""

    def __init__(self, *, per_token: float = 0.2, per_pair: float = 1e-5, decode: float = 20.0) -> None:
        self.pace = Pace()
        self.scheduler: Scheduler[Prompt] = Scheduler(self.pace, itl_target_ms=TARGET, chunk_tokens=CHUNK)
        self.per_token, self.per_pair, self.decode = per_token, per_pair, decode
        self.now = 0.0
        self.prompts: list[Prompt] = []
        self.fed: dict[str, int] = {}

    def arrive(self, agent: str, tokens: int, history: int = 0, reply: int = 0) -> Prompt:
        prompt = Prompt(agent, self.now, tokens, history, reply)
        self.prompts.append(prompt)
        return prompt

    def cost(self, parts: list[tuple[int, int]]) -> float:
        return 5.0 + sum(self.per_token * n + self.per_pair * n * (h + n / 2) for n, h in parts)

    def step(self) -> tuple[Step[Prompt], float]:
        """One planned step, and the milliseconds that it took."""
        decoding = [p for p in self.prompts if not p.remaining]
        plan = self.scheduler.plan(decoding, [p for p in self.prompts if p.remaining])
        took = 0.0
        if plan.decode:
            took += self.decode
            self.pace.decoded(len(plan.decode), self.decode)
        if plan.prefill:
            parts = [(n, p.history) for p, n in plan.prefill]
            self.pace.prefilled(parts, self.cost(parts))
            took += self.cost(parts)
        for prompt in plan.decode:
            prompt.reply -= 1
        for prompt, tokens in plan.prefill:
            prompt.history += tokens
            prompt.remaining -= tokens
            self.fed[prompt.agent_key] = self.fed.get(prompt.agent_key, 0) + tokens
        self.prompts = [p for p in self.prompts if p.remaining or p.reply > 0]
        self.now += took / 1e3
        return plan, took


def check(plan: Step[Prompt], machine: Machine) -> None:
    """What holds for every step, seen right after it."""
    total = sum(n for _, n in plan.prefill)
    assert total <= CHUNK
    assert len({id(p) for p, _ in plan.prefill}) == len(plan.prefill)
    for prompt, tokens in plan.prefill:
        cut = prompt.remaining > 0 and prompt.history % CHUNK
        assert tokens > 0
        assert not cut or tokens % GRAIN == 0


LOADS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it
        st.sampled_from("abcd"),
        st.integers(1, 1500),
        st.integers(0, 4000),
        st.integers(0, 30),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=15)
@given(LOADS, st.sampled_from([0.01, 0.2, 3.0]))
def test_any_load_is_served_whole(load: list[tuple[int, str, int, int, int]], per_token: float) -> None:
    """Every step decodes all that decode and keeps its bounds; while there are prompts, some prompt goes on."""
    machine = Machine(per_token=per_token)
    steps = 0
    for wait, agent, tokens, history, reply in load:
        for _ in range(wait):
            check_step(machine)
        machine.arrive(agent, tokens, history, reply)
    while machine.prompts:
        check_step(machine)
        steps += 1
        assert steps < 20_000


def check_step(machine: Machine) -> None:
    decoding = [p for p in machine.prompts if not p.remaining]
    waiting = any(p.remaining for p in machine.prompts)
    plan, _ = machine.step()
    assert plan.decode == decoding
    assert bool(plan.prefill) == waiting
    check(plan, machine)


@settings(deadline=None, max_examples=8)
@given(st.randoms(use_true_random=False), st.sampled_from([0.05, 0.2, 1.0]), st.integers(500, 20_000))
def test_steps_keep_the_target_while_somebody_decodes(
    rng: random.Random, per_token: float, longest: int
) -> None:
    """Once a few passes were measured, a step ends in time wherever 16 tokens do."""
    machine = Machine(per_token=per_token)
    machine.arrive("speaker", 1, reply=10_000)
    machine.step()
    for _ in range(8):
        machine.arrive(rng.choice("abc"), rng.randint(1, longest), rng.randint(0, longest))
    for n in range(100):
        plan, took = machine.step()
        if n > 8 and sum(t for _, t in plan.prefill) > GRAIN:
            assert took <= 1.1 * TARGET


def test_the_target_is_made_use_of() -> None:
    """The pass that fits is found: steps are not much shorter than they may be."""
    machine = Machine()
    machine.arrive("speaker", 1, reply=10_000)
    machine.arrive("reader", 100_000)
    times = [machine.step()[1] for _ in range(30)]
    assert all(t > 0.7 * min(TARGET, 20 + machine.cost([(CHUNK, 0)])) for t in times[15:])


def test_a_prompt_that_is_alone_is_cut_the_same_however_long_it_takes() -> None:
    cuts = []
    for per_token in (0.001, 0.5, 50.0):
        machine = Machine(per_token=per_token)
        prompt = machine.arrive("a", 1000, history=100)
        sizes = []
        while prompt.remaining:
            plan, _ = machine.step()
            sizes += [n for _, n in plan.prefill]
        cuts.append(sizes)
    assert cuts == [[156, 256, 256, 256, 76]] * 3


def test_short_prompts_share_one_pass() -> None:
    machine = Machine()
    prompts = [machine.arrive(str(i), 40 + i) for i in range(5)]
    plan, _ = machine.step()
    assert [(p, n) for p, n in plan.prefill] == [(p, 40 + i) for i, p in enumerate(prompts)]


def test_a_small_delta_goes_before_a_long_cold_prompt() -> None:
    machine = Machine()
    machine.arrive("reader", 16_000)
    machine.step()
    delta = machine.arrive("talker", 30, history=4000)
    plan, _ = machine.step()
    assert plan.prefill[0] == (delta, 30)


@pytest.mark.parametrize("agents", ["one other", "new ones", "its own"])
def test_a_long_prompt_ends_under_an_endless_stream_of_short_ones(agents: str) -> None:
    """One pass in four goes to who came first; without anyone decoding such a pass has a whole chunk."""
    machine = Machine()
    long = machine.arrive("long", 20 * CHUNK)
    steps = 0
    while long.remaining:
        for i in range(8):
            name = {"one other": "short", "new ones": f"{steps}.{i}", "its own": "long"}[agents]
            machine.arrive(name, 64)
        check_step(machine)
        steps += 1
        assert steps <= (20 + 1) * (PREFILL_PATIENCE + 1)


@settings(deadline=None, max_examples=8)
@given(st.randoms(use_true_random=False), st.booleans())
def test_whoever_came_first_is_fed_in_one_of_four_passes(rng: random.Random, speaking: bool) -> None:
    machine = Machine()
    if speaking:
        machine.arrive("speaker", 1, reply=10_000)
    hungry: dict[Prompt, int] = {}
    for _ in range(60):
        for _ in range(rng.randrange(4)):
            machine.arrive(rng.choice("abcdef"), rng.randint(1, rng.choice([20, 200, 2000])))
        prefilling = [p for p in machine.prompts if p.remaining]
        plan, _ = machine.step()
        if prefilling:
            oldest = min(prefilling, key=lambda p: p.arrived)
            fed = oldest in {p for p, _ in plan.prefill}
            hungry = {oldest: 0 if fed else hungry.get(oldest, 0) + 1}
            assert hungry[oldest] <= PREFILL_PATIENCE


@settings(deadline=None, max_examples=6)
@given(
    st.lists(st.tuples(st.integers(16, 400), st.integers(0, 12)), min_size=2, max_size=5),
    st.booleans(),
)
def test_agents_that_always_want_more_get_equal_shares(habits: list[tuple[int, int]], speaking: bool) -> None:
    """Whatever the size of an agent's prompts, and however many more than a pass holds it sends: at least half of an equal share.

    More than that is room of a pass that nobody else's prompt fits into.
    """
    machine = Machine(per_pair=0.0)
    if speaking:
        machine.arrive("speaker", 1, reply=100_000)
    for _ in range(150):
        for agent, (tokens, more) in enumerate(habits):
            depth = -(-CHUNK // tokens) + more
            mine = sum(p.agent_key == f"agent-{agent}" for p in machine.prompts)
            for _ in range(depth - mine):
                machine.arrive(f"agent-{agent}", tokens)
        machine.step()
    shares = [machine.fed[f"agent-{agent}"] for agent in range(len(habits))]
    assert 2 * len(shares) * min(shares) >= sum(shares)


def test_being_away_earns_nothing() -> None:
    """An agent that was idle for long does not shut out the one that worked."""
    machine = Machine()
    for _ in range(50):
        machine.arrive("busy", 256)
        machine.step()
    machine.fed.clear()
    for _ in range(40):
        for agent in ("busy", "idle"):
            machine.arrive(agent, 256)
        machine.step()
    assert max(machine.fed.values()) <= 1.5 * min(machine.fed.values())


def test_admission_prefers_small_requests_and_lets_nobody_be_overtaken_for_ever() -> None:
    scheduler = Machine().scheduler
    large = Prompt("a", 0.0, 30_000)
    waiting, admitted = [large], 0
    while large in waiting:
        waiting.append(Prompt(f"b{admitted}", float(admitted + 1), 50))
        first = scheduler.waiting(waiting)[0]
        assert scheduler.must_be_next(first) == (first is large)
        scheduler.admitted(first)
        waiting.remove(first)
        admitted += 1
    assert admitted == ADMISSION_PATIENCE + 1


def test_a_flood_of_one_agent_does_not_put_off_another() -> None:
    """A larger request of another agent ends long before the flood's smaller ones do."""
    machine = Machine()
    flood = [machine.arrive("flood", 200) for _ in range(40)]
    machine.step()
    other = machine.arrive("other", 600)
    for _ in range(8):
        machine.step()
    assert not other.remaining
    assert sum(p.remaining > 0 for p in flood) > 20

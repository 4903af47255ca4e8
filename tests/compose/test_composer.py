"""The composer: what prompts teach, what is composed of that, and what never is."""

from __future__ import annotations

import random

import pytest

from agentmem.compose import planners
from agentmem.compose.anchors import Eviction
from agentmem.compose.composer import EXACT, Composer, Composition, Policy, Provenance, Span
from agentmem.compose.ledger import Pair
from agentmem.compose.library import Library
from agentmem.compose.planners import Put, Read, Steps
from agentmem.compose.policy import PLANNERS
from agentmem.compose.reuse import Reuse
from agentmem.compose.segment import text_hash
from agentmem.errors import BadRequest
from tests.compose.prompts import Stage, divergence, stage
from tests.compose.rounds import COMPOSED, ROOM, Round, Turn

pytestmark = pytest.mark.slow

SOLVER, ANALYST, JUDGE = "You solve what is asked.", "You check a draft with care.", "You decide in the end."
QUESTIONS = [
    f"Lamp number {n} has {n * 7} wicks and burns {n + 2} cans of oil; how long does it burn?"
    for n in range(9)
]


@pytest.fixture(scope="module")
def world() -> Stage:
    return stage(layers=3)


@pytest.fixture
def rounds(world: Stage) -> Round:
    return Round(world)


def chain(rounds: Round, question: str) -> list[Turn]:
    """Three agents, each of whom hears those before."""
    solver = rounds.turn("solver", SOLVER, question)
    analyst = rounds.turn("analyst", ANALYST, f"Question: {question}\nDraft: {solver.reply}\nIs it right?")
    heard = f"{question}\n1: {solver.reply}\n2: {analyst.reply}\nWho is right?"
    return [solver, analyst, rounds.turn("judge", JUDGE, heard)]


def contiguous(steps: Steps, ids: list[int], known: int = 0) -> bool:
    return [i for s in steps for i in s.ids] == ids[known:] and isinstance(steps[-1], Read)


def test_three_agents_over_thirty_requests(rounds: Round, world: Stage) -> None:
    """Part E.1, "Pipeline": first all is read, then more and more is put; every plan is of its prompt's tokens, end to end."""
    made, apart = [], []
    for question in (*QUESTIONS, QUESTIONS[0]):
        for turn in chain(rounds, question):
            assert all(a.stop <= b.start for a, b in zip(turn.spans, turn.spans[1:], strict=False))
            made.append(turn.made is not None)
            if turn.made is None:
                continue
            assert contiguous(turn.made.steps, turn.ids)
            assert turn.made.composed_tokens + turn.made.read_tokens == len(turn.ids)
            assert turn.made.composed_tokens == sum(len(s.ids) for s in turn.made.steps if isinstance(s, Put))
            dense = world.prompt().read(turn.ids)
            moved = world.prompt()
            bare = [Put(s.ids, _base_of(rounds, s)) if isinstance(s, Put) else s for s in turn.made.steps]
            apart.append((divergence(dense, turn.logits), divergence(dense, planners.run(moved, bare))))
    assert not any(made[:6]), "two dense runs of each agent teach the anchors that are asked for"
    assert not any(made[0:27:3]), "the solver hears nothing that others have read"
    assert sum(made) >= 8
    ours, repositioned = (sum(column) for column in zip(*apart, strict=True))
    assert ours < repositioned


def _base_of(rounds: Round, put: Put) -> planners.State:
    """The state of a put text without its offsets; what is not known by its ids stays as it is."""
    segment = rounds.library.segment("home", text_hash(put.ids))
    return segment.base.unpacked() if segment is not None else put.state


def test_the_same_text_serves_every_consumer_from_one_base(rounds: Round) -> None:
    for question in QUESTIONS[:3]:
        chain(rounds, question)
    space = rounds.library.space("home")
    assert {text_hash(_ids(rounds, q)) for q in QUESTIONS[:3]} <= space.segments.keys()
    owners = space.segments[text_hash(_ids(rounds, QUESTIONS[0]))].owners
    assert owners == {"solver", "analyst", "judge"}
    names = {name for name, _ in rounds.library.pool.items()}
    assert len(names) == 2 + 3, "a slot of a template each: the analyst's two and the judge's three"
    made_of = rounds.library.made_of("home", text_hash(_ids(rounds, QUESTIONS[0])))
    assert len(made_of) == 1, "one text, one state, in two slots"
    assert sum(anchor.text in made_of for _, anchor in rounds.library.pool.items()) == 2


def _ids(rounds: Round, text: str) -> list[int]:
    return rounds.stage.ids(text)


def test_what_explains_a_composition(rounds: Round) -> None:
    for question in QUESTIONS[:3]:
        chain(rounds, question)
    _, analyst, _ = chain(rounds, QUESTIONS[3])
    assert analyst.made is not None
    n = len(_ids(rounds, QUESTIONS[3]))
    assert f"{n} tokens of a user message composed from 3 anchors" in analyst.made.lines
    rounds.library.register("home", "spec.md", _ids(rounds, QUESTIONS[4]))
    _, analyst, _ = chain(rounds, QUESTIONS[4])
    assert analyst.made is not None
    assert any("of document 'spec.md' composed from" in line for line in analyst.made.lines)


@pytest.mark.parametrize(
    "planner", [PLANNERS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PLANNERS[1:])]
)
def test_every_planner_makes_the_prompt(world: Stage, planner: str) -> None:
    eviction = Eviction.PAPER if planner == "paper" else Eviction.DECAYED
    rounds = Round(world, Library(ROOM, ROOM, eviction=eviction))
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    rounds.policy = Policy("composed", planner, minimum=2)
    solver = rounds.turn("solver", SOLVER, QUESTIONS[5])
    said = f"Question: {QUESTIONS[5]}\nDraft: {solver.reply}\nIs it right?"
    analyst = rounds.turn("analyst", ANALYST, said)
    if planner == "paper" and analyst.made is None:
        assert "none clearly the nearest" in rounds.composer.why_not, "its gate"
        return
    assert analyst.made is not None
    assert analyst.made.planner == planner
    assert contiguous(analyst.made.steps, analyst.ids)
    tail = "\nIs it right?<|im_end|>\n<|im_start|>assistant\n"
    last = analyst.made.steps[-1]
    assert len(last.ids) == (len(world.ids(tail)) if planner in ("kvcomm+tail", "lego", "blend") else 1)


def test_the_paper_s_planner_needs_the_paper_s_anchors(rounds: Round) -> None:
    chain(rounds, QUESTIONS[0])
    assert rounds.turn("solver", SOLVER, QUESTIONS[0], policy=Policy("composed", "paper")).made is None
    assert "the paper's" in rounds.composer.why_not


def test_too_few_anchors_fall_back_as_the_policy_says(rounds: Round) -> None:
    chain(rounds, QUESTIONS[0])
    lego = Policy("composed", fallback="lego", minimum=5)
    solver = rounds.turn("solver", SOLVER, QUESTIONS[1])
    said = f"Question: {QUESTIONS[1]}\nDraft: {solver.reply}\nIs it right?"
    assert rounds.turn("analyst", ANALYST, said, policy=Policy("composed", minimum=5)).made is None
    assert "too few anchors" in rounds.composer.why_not
    turn = rounds.turn("another", "You think otherwise.", said, policy=lego)
    assert turn.made is not None
    assert turn.made.planner == "lego"


@pytest.mark.parametrize("reuse", ["exact", "off"])
def test_other_policies_compose_nothing(rounds: Round, reuse: Reuse) -> None:
    rounds.policy = Policy(reuse, minimum=1)
    for question in QUESTIONS[:2]:
        assert all(turn.made is None for turn in chain(rounds, question))
    assert rounds.composer.why_not == f"the policy is {reuse}"


def test_what_the_exact_store_has_is_left_out(rounds: Round, world: Stage) -> None:
    """Wherever it ends: in fixed text, in the middle of a text, behind all that could be composed."""
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    turn = chain(rounds, QUESTIONS[5])[1]
    whole = rounds.composer.plan("home", turn.ids, turn.spans, 0, COMPOSED, "analyst")
    assert whole is not None
    dense = world.prompt().read(turn.ids)
    for known in (10, 60, 100, 140):
        made = rounds.composer.plan("home", turn.ids, turn.spans, known, COMPOSED, "analyst")
        assert made is not None
        assert contiguous(made.steps, turn.ids, known)
        prompt = world.prompt()
        prompt.read(turn.ids[:known])
        assert divergence(dense, planners.run(prompt, made.steps)) < 0.01
    assert rounds.composer.plan("home", turn.ids, turn.spans, len(turn.ids) - 1, COMPOSED, "analyst") is None


def test_texts_that_nobody_knows_are_read(rounds: Round) -> None:
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    solver = rounds.turn("solver", SOLVER, QUESTIONS[5])
    rounds.library.forget("home", "solver")
    rounds.library.forget("home", "analyst")
    rounds.library.forget("home", "judge")
    said = f"Question: {QUESTIONS[5]}\nDraft: {solver.reply}\nIs it right?"
    assert rounds.turn("analyst", ANALYST, said).made is None


def test_what_is_said_behind_composed_state_is_no_base(rounds: Round) -> None:
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    turn = chain(rounds, QUESTIONS[5])[1]
    assert turn.made is not None
    assert turn.made.provenance.hops == 1
    said = rounds.library.segment("home", text_hash(_ids(rounds, turn.reply)))
    assert said is not None
    assert said.provenance.parents == turn.made.provenance.parents
    assert text_hash(_ids(rounds, QUESTIONS[5])) in said.provenance.parents
    heard = f"This is what was said to me: {turn.reply}\nWhat now?"
    for policy, composed in ((COMPOSED, False), (Policy("composed", "lego", hops=1), True)):
        made = _plan(rounds, heard, policy)
        assert (made is not None) == composed
        if made is not None:
            assert made.provenance.hops == 2
    later = rounds.turn("other", JUDGE, heard)
    assert later.made is None
    now = rounds.library.segment("home", text_hash(_ids(rounds, turn.reply)))
    assert now is not None
    assert now.provenance == EXACT, "it was read anew, so that its state is another one"
    assert now.mark != said.mark


def _plan(rounds: Round, text: str, policy: Policy) -> Composition | None:
    ids = _ids(rounds, f"#{text}#")
    return rounds.composer.plan("home", ids, [Span(1, len(ids) - 1, "user")], 0, policy, "other")


def test_hops_are_capped(world: Stage) -> None:
    rounds = Round(world)
    ids = rounds.stage.ids("a reply that was said behind what was composed of composed state")
    prompt = world.prompt()
    prompt.read(ids)
    rounds.composer.learn(
        "home", ids, [Span(0, len(ids), "assistant")], prompt.state, Provenance((b"x",), 2), "a"
    )
    assert len(rounds.library.space("home").segments) == 0
    rounds.composer.learn(
        "home", ids, [Span(0, len(ids), "assistant")], prompt.state, Provenance((b"x",), 1), "a"
    )
    assert [s.provenance.hops for s in rounds.library.space("home").segments.values()] == [1]


def test_state_that_is_not_there_teaches_nothing(world: Stage) -> None:
    rounds = Round(world)
    chain(rounds, QUESTIONS[0])
    ids = world.ids(f"#{QUESTIONS[0]}#{QUESTIONS[1]}#")
    n = len(world.ids(QUESTIONS[0]))
    prompt = world.prompt()
    prompt.read(ids)

    def state(start: int, stop: int) -> planners.State:
        if start < n:
            raise LookupError
        return prompt.state(start, stop)

    spans = [Span(1, n + 1, "user"), Span(n + 2, len(ids) - 1, "user")]
    before = len(rounds.library.pool)
    rounds.composer.learn("home", ids, spans, state, EXACT, "other")
    assert len(rounds.library.pool) == before
    assert rounds.library.segment("home", text_hash(world.ids(QUESTIONS[1]))) is not None


def test_what_forgotten_agents_said_goes_with_the_anchors_that_heard_it(rounds: Round) -> None:
    """An anchor knows its own text, and what stood in front of it."""
    for question in QUESTIONS[:2]:
        chain(rounds, question)
    rounds.turn("stranger", JUDGE, QUESTIONS[0])
    rounds.turn("poet", "You speak in verse.", f"{QUESTIONS[5]} is the first; {QUESTIONS[0]} is the next.")
    said = f"{QUESTIONS[0]}, and {QUESTIONS[1]}"
    for agent in ("poet", "critic"):
        rounds.turn(agent, "You know them all.", said)
    rounds.composer.forget("home", "poet")
    sources = rounds.library.sources.values()
    assert all("poet" not in s.owners | s.seen_by for s in sources)
    assert all(s.owners for s in sources)
    before = len(sources)
    for agent in ("solver", "analyst", "judge"):
        rounds.composer.forget("home", agent)
    rounds.library.check_integrity()
    assert 0 < len(rounds.library.sources) < before
    assert all(s.owners <= {"critic", "stranger"} for s in rounds.library.sources.values())


def test_namespaces_know_nothing_of_each_other(rounds: Round) -> None:
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    solver = rounds.turn("solver", SOLVER, QUESTIONS[5])
    said = f"Question: {QUESTIONS[5]}\nDraft: {solver.reply}\nIs it right?"
    assert rounds.turn("analyst", ANALYST, said, namespace="elsewhere").made is None
    assert rounds.turn("analyst", ANALYST, said).made is not None


def test_a_declared_template_teaches_texts_that_were_never_messages(world: Stage) -> None:
    rounds = Round(world)
    rounds.library.declare("home", "ask", "The question is: {{question}}\nAnswer.")
    rounds.library.declare(
        "home", "check", "The question is: {{question}}\nThe solver says: {{solver}}\nCheck."
    )
    made = []
    for question in QUESTIONS[:4]:
        solver = rounds.turn("solver", SOLVER, f"The question is: {question}\nAnswer.")
        text = f"The question is: {question}\nThe solver says: {solver.reply}\nCheck."
        made.append(rounds.turn("analyst", ANALYST, text).made)
    assert [m is not None for m in made] == [False, False, True, True]
    assert rounds.library.segment("home", text_hash(world.ids(QUESTIONS[0]))) is not None
    assert made[-1] is not None
    assert any("of slot 'question' composed" in line for line in made[-1].lines)


def test_what_the_next_prompt_asks_for_is_computed_ahead(world: Stage) -> None:
    rounds = Round(world, policy=Policy("composed", minimum=9))
    for question in QUESTIONS[:6]:
        rounds.turn("solver", SOLVER, question)
        rounds.turn("analyst", ANALYST, question)
    pool = rounds.library.pool
    assert pool.nbytes == pool.anchor_bytes
    assert rounds.composer.prepare()
    while rounds.composer.prepare():
        pass
    ready = pool.nbytes
    assert ready > pool.anchor_bytes
    rounds.turn("solver", SOLVER, QUESTIONS[7])
    assert rounds.turn("analyst", ANALYST, QUESTIONS[7], policy=Policy("composed")).made is not None
    assert pool.nbytes == ready


def test_auto_waits_for_a_calibration(world: Stage) -> None:
    rounds = Round(world)
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    turn = chain(rounds, QUESTIONS[5])[1]
    assert turn.made is not None
    auto, composer = Policy("auto", minimum=2), rounds.composer

    def plan() -> Composition | None:
        return composer.plan("home", turn.ids, turn.spans, 0, auto, "analyst")

    assert plan() is None
    assert composer.why_not == "this template is not calibrated"
    template = turn.made.template
    composer.ledger.calibrate("home", template, auto.planner, [Pair(0.01, 0.01, 1.0)] * 20)
    assert plan() is not None
    composer.ledger.audit("home", template, auto.planner, 0.2)
    assert plan() is None
    assert "demoted" in composer.why_not


def test_cases_are_prompts_again(rounds: Round) -> None:
    turns = [chain(rounds, question)[1] for question in QUESTIONS[:4]]
    assert turns[-1].made is not None
    template = turns[-1].made.template
    cases = rounds.composer.ledger.cases("home", template)
    built = [rounds.composer.rebuilt("home", template, case) for case in cases]
    assert [b[0] for b in built if b is not None] == [t.ids for t in turns]
    assert built[-1] is not None
    made = rounds.composer.plan("home", *built[-1], 0, COMPOSED, "analyst")
    assert made is not None
    assert made.template == template
    rounds.library.forget("home")
    assert rounds.composer.rebuilt("home", template, cases[0]) is None


def test_two_percent_are_audited() -> None:
    composer, rng = Composer(Library(ROOM, ROOM)), random.Random(0)
    assert 100 < sum(composer.audits(rng) for _ in range(10_000)) < 300


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(BadRequest, match="planner"):
        Policy(planner="kvcom")
    with pytest.raises(BadRequest, match="fall back"):
        Policy(fallback="exact")

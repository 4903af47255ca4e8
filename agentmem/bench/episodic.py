"""`bench episodic`: what a conversation in a small budget costs the answers, for episodes and for what they are compared with.

A conversation is read whole, and again by every policy into an M-th of its rows. Compared are the predictions of gold answers
over each cache with those over the full one. Policies that build caches block by block hold a budget and a block at most.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.answers import Journal, Record, Table
from agentmem.bench.checks import check
from agentmem.bench.dialogues import generated
from agentmem.bench.judge import Judge
from agentmem.bench.transcripts import Dialogue, Frame, evenly, first_that_fit
from agentmem.engine.layout import layout
from agentmem.episode.baselines import (
    CATALYST,
    REPEAT,
    KeyDiff,
    KVzip,
    Policy,
    Prompted,
    Random,
    SnapKV,
    Streaming,
)
from agentmem.episode.budgets import allotted
from agentmem.episode.build import Builder, Plan
from agentmem.episode.concordance import concordance_of
from agentmem.episode.encoder import Encoder
from agentmem.episode.fold import folded, viewed
from agentmem.episode.held import Held
from agentmem.episode.patched import patched_prompt
from agentmem.episode.routing import route
from agentmem.episode.rows import LayerKind, kinds_of, whole_kinds
from agentmem.episode.segment import segments_of
from agentmem.episode.selection import Heads
from agentmem.episode.sensitivity import sensitivity
from agentmem.episode.store import MemoryStore
from agentmem.episode.topic import Topic, cluster
from agentmem.episode.views import View, materialised, store_scores, view_of
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.quant.device import backend

Say = Callable[[str], None]
Caches = Iterator[tuple[str, int | None, Held]]
"""Name, the episode that it is of, and the cache."""

POLICIES = (
    "random", "streaming", "keydiff", "snapkv", "infinipot", "kvzip", "matched", "views", "views by blocks", "folded",
    "packed views", "packed matched", "question", "kvzip-stored", "views of even heads", "views by layers",
)  # fmt: skip
LIMIT = 7000
"""Tokens of a conversation at most."""
ROOM = 400
"""Positions that questions and scoring prompts need behind a history."""
UNSEEN, MEASURED = (1000, 1001), 512
"""Seeds of conversations that layers' sensitivity is measured on, and the tokens of their blocks."""
SAID = 0.6
"""The part of a conversation that a view is made of before the rest is folded in."""


@dataclass(frozen=True, slots=True)
class Setting:
    """`episodes` and `representatives` as many as there are segments for; `block` tokens between evictions."""

    policies: tuple[str, ...]
    sessions: int
    questions: int | None
    episodes: int
    representatives: int
    block: int
    heads: Heads
    format: str
    prompt_limit: int


class Ground:
    """The model, and the two ways its rows are held."""

    def __init__(self, model: LoadedModel, encoder: Encoder, format: str, calibrations: Any) -> None:
        self.model, self.encoder, self.frame = model, encoder, Frame(model.tokenizer)
        plan = layout(model, format, 64, calibrations)
        self.network, self.dtype = Network(model.model), model.dtype
        self.whole: Sequence[LayerKind] = whole_kinds([c.shape for c in plan.geometry.codecs], model.dtype)
        self.packed: Sequence[LayerKind] = kinds_of(plan.geometry.codecs, plan.geometry.key_maps)

    @cached_property
    def sensitivity(self) -> list[float]:
        """Of each layer, measured once, on conversations that nothing else is measured on."""
        text = "\n\n".join(generated(seed).text for seed in UNSEEN)
        shapes = [kind.shape for kind in self.whole]
        return sensitivity(self.network, shapes, self.dtype, self.frame.history(text), block=MEASURED)

    def read(self, ids: Sequence[int], kinds: Sequence[LayerKind]) -> Held:
        held = Held.empty(self.network, kinds, self.dtype)
        held.absorb(ids)
        return held


class Contest:
    """One conversation, its episodes, and every policy's caches of it."""

    def __init__(self, ground: Ground, dialogue: Dialogue, setting: Setting) -> None:
        self.ground, self.setting = ground, setting
        short = first_that_fit(
            dialogue, ground.frame, setting.sessions, min(LIMIT, ground.model.max_context - ROOM)
        )
        self.name, self.ids = short.name, ground.frame.history(short.text)
        self.questions = evenly(short.questions, setting.questions)
        self.segments = segments_of(short.utterances)
        self.embeddings = ground.encoder.encode([s.text for s in self.segments])
        self.topics = cluster(self.embeddings, setting.episodes)
        self.full = ground.read(self.ids, ground.whole)
        asked = [ground.frame.question(q) for _, q in self.questions]
        encode = ground.model.tokenizer.encode
        choices = {n: [encode(o) for o in q.others] for n, (_, q) in enumerate(self.questions) if q.planted}
        self.judge = Judge(self.full, asked, choices)
        queries = ground.encoder.encode([q.text for _, q in self.questions], query=True)
        words = concordance_of(short.utterances, self.segments)
        covered = [words.coverage(q.text) for _, q in self.questions]
        self.routes = [
            route(q, c, self.embeddings, self.topics, floor=-1.0).topic or 0
            for q, c in zip(queries, covered, strict=True)
        ]
        self._packed: MemoryStore | None = None
        self.most_rows, self.switch_ms = 0.0, list[float]()

    def hits(self) -> int:
        """Questions that go to an episode with a segment of their evidence."""
        members = {t.id: set(t.members) for t in self.topics}
        of = {u: n for n, s in enumerate(self.segments) for u in range(s.first, s.last + 1)}
        return sum(
            any(of.get(e) in members[r] for e in q.evidence)
            for (_, q), r in zip(self.questions, self.routes, strict=True)
        )

    def prompt(self, topic: Topic, before: int | None = None) -> list[int]:
        """The topic's patched prompt; of its segments before a segment's number, where one is given."""
        members = [n for n in topic.members if before is None or n < before] or [0]
        near = {n: float(self.embeddings[n] @ topic.centroid) for n in members}
        chosen = sorted(sorted(members, key=lambda n: (-near[n], n))[: self.setting.representatives])
        return patched_prompt(
            self.ground.model.tokenizer, [self.segments[n] for n in chosen], self.setting.prompt_limit,
            [near[n] for n in chosen],
        )  # fmt: skip

    def budgets(self, compression: int, times: int = 1) -> tuple[int, ...]:
        return (min(len(self.ids), times * (len(self.ids) // compression)),) * len(self.ground.whole)

    def rows(self, compression: int) -> dict[str, int]:
        """Rows a layer and head: those that attention sees, and those that each way to keep them holds in all."""
        budget = self.budgets(compression)[0]
        every = self.budgets(compression, len(self.topics))[0]
        return {"active": budget, "one cache": budget, "episodes": every, "views": len(self.ids)}

    def caches(self, policy: str, compression: int) -> Caches:
        """The caches of one policy, made one after the other."""
        budgets, prompts = self.budgets(compression), [self.prompt(t) for t in self.topics]
        store = MemoryStore(self.full)
        match policy:
            case "matched" | "packed matched":
                kinds = self.ground.whole if policy == "matched" else self.ground.packed
                for topic, prompt in zip(self.topics, prompts, strict=True):
                    yield policy, topic.id, self._built(Prompted(tuple(prompt)), budgets, kinds)
            case "views" | "views of even heads" | "views by layers":
                heads = Heads.UNIFORM if policy == "views of even heads" else self.setting.heads
                if policy == "views by layers" and budgets[0] < len(self.ids):
                    budgets = tuple(allotted(self.ground.sensitivity, budgets[0]))
                for topic, prompt in zip(self.topics, prompts, strict=True):
                    yield policy, topic.id, self._shown(store, self._view(store, prompt, budgets, heads))
            case "views by blocks":
                for topic, prompt in zip(self.topics, prompts, strict=True):
                    yield policy, topic.id, self._shown(store, self._by_blocks(store, prompt, budgets))
            case "packed views":
                packed = self._packed_store()
                for topic, prompt in zip(self.topics, prompts, strict=True):
                    yield policy, topic.id, self._shown(packed, self._view(packed, prompt, budgets))
            case "folded":
                for topic, prompt in zip(self.topics, prompts, strict=True):
                    yield policy, topic.id, self._shown(store, self._folded(store, topic, prompt, budgets))
            case "kvzip-stored":
                budgets = self.budgets(compression, len(self.topics))
                yield policy, None, self._built(self._baseline("kvzip"), budgets, self.ground.whole)
            case _:
                yield policy, None, self._built(self._baseline(policy), budgets, self.ground.whole)

    def for_question(self, number: int, compression: int) -> Held:
        """The rows that the question itself would choose."""
        store = MemoryStore(self.full)
        return self._shown(store, self._view(store, self.judge.asked[number][0], self.budgets(compression)))

    def _baseline(self, name: str) -> Policy:
        asked = self.ground.frame.asked
        made: Mapping[str, Callable[[], Policy]] = {
            "random": Random, "streaming": Streaming, "keydiff": KeyDiff, "snapkv": SnapKV,
            "infinipot": lambda: Prompted(tuple(asked(CATALYST))), "kvzip": lambda: KVzip(tuple(asked(REPEAT))),
        }  # fmt: skip
        return made[name]()

    def _built(self, policy: Policy, budgets: tuple[int, ...], kinds: Sequence[LayerKind]) -> Held:
        g = self.ground
        plan = Plan(budgets, self.setting.block, self.setting.heads)
        made = Builder(g.network, kinds, g.dtype, self.ids, policy, plan, max_context=g.model.max_context)
        held = made.run()
        self.most_rows = max(self.most_rows, max(n - b for n, b in zip(made.most, budgets, strict=True)))
        return held

    def _view(
        self, store: MemoryStore, prompt: Sequence[int], budgets: Sequence[int], heads: Heads | None = None
    ) -> View:
        scores = store_scores(self.ground.network, store, prompt)
        return view_of(store, scores, budgets, heads or self.setting.heads)

    def _by_blocks(self, store: MemoryStore, prompt: Sequence[int], budgets: Sequence[int]) -> View:
        g, s = self.ground, self.setting
        return viewed(g.network, store, prompt, budgets, g.dtype, block=s.block, heads=s.heads)

    def _shown(self, store: MemoryStore, view: View) -> Held:
        begun = time.perf_counter()
        held = materialised(self.ground.network, store, view, self.ground.dtype)
        self.switch_ms.append(1e3 * (time.perf_counter() - begun))
        return held

    def _packed_store(self) -> MemoryStore:
        if self._packed is None:
            self._packed = MemoryStore(self.ground.read(self.ids, self.ground.packed))
        return self._packed

    def _folded(
        self, store: MemoryStore, topic: Topic, prompt: Sequence[int], budgets: Sequence[int]
    ) -> View:
        """A view of the first part, and the rest folded in block by block."""
        first = copy.copy(store)
        first.tokens = int(SAID * len(self.ids))
        view = self._view(first, self.prompt(topic, int(SAID * len(self.segments))), budgets)
        g, s = self.ground, self.setting
        return folded(g.network, store, view, prompt, budgets, g.dtype, block=s.block, heads=s.heads)

    def record(
        self, number: int, compression: int, policy: str, score: tuple[float, float, float, bool]
    ) -> Record:
        which, question = self.questions[number]
        kl, top1, nll, exact = score
        tokens = len(self.judge.asked[number][1])
        return Record(self.name, which, compression, policy, kl, top1, nll, exact, question.planted, tokens)

    def measured(self, policy: str, compression: int) -> list[Record]:
        """Records of a policy; of one with episodes also those of the wrong ones, on average, and of the best in hindsight."""
        if policy == "question":
            each = [
                self.judge.scores(self.for_question(n, compression), [n]) for n in range(len(self.questions))
            ]
            return [self.record(n, compression, policy, s) for found in each for n, s in found.items()]
        found = {episode: self.judge.scores(held) for _, episode, held in self.caches(policy, compression)}
        if None in found:
            return [self.record(n, compression, policy, s) for n, s in found[None].items()]
        out = []
        for n, right in enumerate(self.routes):
            by_episode = {e: scores[n] for e, scores in found.items()}
            others = [s for e, s in by_episode.items() if e != right]
            out.append(self.record(n, compression, policy, by_episode[right]))
            if others:
                out.append(self.record(n, compression, _other(policy), _mean(others)))
            best = min(by_episode.values(), key=lambda s: s[0])
            out.append(self.record(n, compression, f"{policy}, best in hindsight", best))
        return out


def run(
    ground: Ground, dialogues: Sequence[Dialogue], compressions: Sequence[int], setting: Setting, journal: Journal, say: Say
) -> dict[str, Any]:  # fmt: skip
    """Every policy on every conversation, but for what the journal has already; all of it counts in the table."""
    conversations = []
    for dialogue in dialogues:
        begun = time.perf_counter()
        contest = Contest(ground, dialogue, setting)
        say(
            f"{contest.name}: {len(contest.ids)} tokens, {len(contest.segments)} segments, "
            f"{len(contest.questions)} questions, {contest.hits()} at their evidence; {time.perf_counter() - begun:.0f} s"
        )
        peaks: dict[str, float] = {}
        for compression in compressions:
            if not journal.has(contest.name, compression, "full"):
                full = contest.judge.scores(contest.full)
                journal.add([contest.record(n, compression, "full", s) for n, s in full.items()])
            for policy in setting.policies:
                if not journal.has(contest.name, compression, policy):
                    journal.add(_timed(contest, policy, compression, peaks, say))
        conversations.append(_about(contest, compressions, peaks))
    table = Table(journal.records)
    for row in table.rows():
        say(_line(row))
    return {
        "schema_version": 1, "model": ground.model.name, "backend": backend(), "format": setting.format,
        "encoder": ground.encoder.name, "block": setting.block, "heads": str(setting.heads),
        "conversations": conversations, "rows": table.rows(), "comparisons": table.comparisons(),
        "checks": [*table.checks(), *_own_checks(conversations)],
    }  # fmt: skip


def _timed(
    contest: Contest, policy: str, compression: int, peaks: dict[str, float], say: Say
) -> list[Record]:
    mx.clear_cache()
    mx.reset_peak_memory()
    begun = time.perf_counter()
    found = contest.measured(policy, compression)
    peaks[f"{compression}x, {policy}"] = mx.get_peak_memory() / 1e6
    own = [r for r in found if r.policy == policy]
    say(
        f"{contest.name}, {compression}x, {policy}: KL {np.mean([r.kl for r in own]):.3f}, "
        f"top 1 {np.mean([r.top1 for r in own]):.3f}; {time.perf_counter() - begun:.0f} s"
    )
    return found


def _about(contest: Contest, compressions: Collection[int], peaks: Mapping[str, float]) -> dict[str, Any]:
    """What a conversation was, and what it took. Rows are those of one layer and head."""
    each = contest.full.nbytes / len(contest.ids)
    return {
        "name": contest.name, "tokens": len(contest.ids), "segments": len(contest.segments),
        "questions": len(contest.questions), "episodes": len(contest.topics), "hits": contest.hits(),
        "rows": {c: contest.rows(c) for c in compressions},
        "bytes_a_token": each, "prompts": [len(contest.prompt(t)) for t in contest.topics],
        "rows_beyond_budget": contest.most_rows, "block": contest.setting.block,
        "switch_ms": float(np.median(contest.switch_ms)) if contest.switch_ms else None, "peak_mb": dict(peaks),
    }  # fmt: skip


def _own_checks(conversations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    if any(c["rows_beyond_budget"] for c in conversations):
        most = max(c["rows_beyond_budget"] / c["block"] for c in conversations)
        made.append(check("rows beyond the budget / a block", most, 1.0, "ratio", True))
    labelled = sum(c["questions"] for c in conversations)
    if labelled:
        hits = sum(c["hits"] for c in conversations) / labelled
        made.append(check("questions routed to their evidence", hits, 0.7, "ratio", False))
    return made


def _other(policy: str) -> str:
    return "mismatched" if policy == "matched" else f"mismatched {policy}"


def _mean(scores: Sequence[tuple[float, float, float, bool]]) -> tuple[float, float, float, bool]:
    kl, top1, nll = (float(np.mean([s[i] for s in scores])) for i in range(3))
    return kl, top1, nll, all(s[3] for s in scores)


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['compression']}x{' planted' if row['planted'] else ''} {row['policy']}: KL {row['kl']:.3f} "
        f"({row['kl_low']:.3f}..{row['kl_high']:.3f}), top 1 {row['top1']:.3f}, exact {row['exact']:.3f}, "
        f"{row['questions']} questions"
    )

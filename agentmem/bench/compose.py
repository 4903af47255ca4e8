"""`bench compose`: what reusing segments behind other text costs the answers, and saves.

Agents work on a question one after the other: each has the question and all answers before its own, behind a role of its own.
A chain has three of them, a round five. Question and answers were read or said elsewhere before; each planner puts the prompts
of all agents but the first together. Compared are its predictions with those of a prompt that was read whole, both held in the
daemon's KV format, over the greedy answer behind that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.bench.team import TASKS, Call, Family, Team, families
from agentmem.compose import planners
from agentmem.compose.anchors import Anchor, Eviction, Pool, paper_gate
from agentmem.compose.blend import blend
from agentmem.compose.offsets import Paper
from agentmem.compose.planners import Kvcomm, Piece, Steps
from agentmem.compose.prompt import Prompt
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend

Say = Callable[[str], None]

SHORT = 16
"""Tokens of an answer that is compared as a whole."""
ROUNDS = {"chain": 3, "round": 5}
NOTHING = 1e-9
"""Nats that are rounding."""
ROUND_FAMILIES = 1
"""Families whose questions five agents work on, too."""
PLANNERS = (
    "dense", "exact", "repositioned", "lego", "blend", "kvcomm-paper", "kvcomm", "kvcomm+tail",
)  # fmt: skip


@dataclass(slots=True)
class Scores:
    """What one planner did to all tested prompts. refused: those that it would not make."""

    divergence: list[np.ndarray] = field(default_factory=list)
    agreement: list[np.ndarray] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    refused: int = 0
    bytes: list[int] = field(default_factory=list)

    def mean_s(self, agent: str | None = None) -> float:
        found = [s for name, s in self.seconds if agent in (None, name)]
        return float(np.mean(found)) if found else float("nan")

    def row(self, name: str, dense: Scores, last: str) -> dict[str, Any]:
        every, agreed = np.concatenate(self.divergence), np.concatenate(self.agreement)
        shares = np.array([a.mean() for a in self.agreement])
        counts = np.array([len(a) for a in self.agreement])
        # Tokens of one answer are not independent: the error is that of a mean over prompts, by their lengths.
        spread = np.sqrt((counts**2 * (shares - agreed.mean()) ** 2).sum()) / counts.sum()
        return {
            "planner": name,
            "requests": len(self.divergence),
            "refused": self.refused,
            "tokens": len(every),
            "kl": float(every.mean()),
            "kl_p95": float(np.percentile(every, 95)),
            "kl_first": float(np.mean([d[0] for d in self.divergence])),
            "top1": float(agreed.mean()),
            "top1_error": float(spread),
            "same_answers": float(np.mean([a[:SHORT].all() for a in self.agreement])),
            "read": float(np.mean(self.read)),
            "ttft_ms": 1e3 * self.mean_s(),
            "dense_over_this": dense.mean_s() / self.mean_s(),
            "last_ttft_ms": 1e3 * self.mean_s(last),
            "last_dense_over_this": dense.mean_s(last) / self.mean_s(last),
            "bytes": max(self.bytes, default=0),
        }


class Memory:
    """What the planners with anchors remember of one family: a pool for ours, and one in the paper's way."""

    def __init__(self, team: Team, budget: int) -> None:
        self.team = team
        self.ours, self.papers = Pool(budget), Pool(budget, eviction=Eviction.PAPER)

    def pools(self, names: Collection[str]) -> list[Pool]:
        """Those that these planners ask."""
        return [self.ours, self.papers] if "kvcomm-paper" in names else [self.ours]

    def observe(self, call: Call, pool: Pool) -> None:
        pieces = self.team.pieces(call.agent, call.known)
        planners.observe(pool, pieces, call.prompt, call.agent)

    def sixteen_bits(self) -> int:
        """Bytes of our anchors if they were the paper's: keys and values of each text, and each offset, in 16 bits."""
        elements = self.team.templates[self.team.agents[0]].bases[0].rows.shape[1]
        tokens = sum(
            len(a) + sum(len(s) for o in a.offsets.values() for s in o) for _, a in self.ours.items()
        )
        return 2 * elements * tokens

    def composed(self, name: str, call: Call) -> Prompt | None:
        """The prompt as a planner makes it; None where it will not."""
        prompt = self.team.prompt()
        pieces = self.team.pieces(call.agent, call.known)
        if name == "blend":
            mx.eval(blend(self.team.network, prompt, pieces))
            return prompt
        steps = self._steps(name, call.agent, pieces)
        if steps is None:
            return None
        mx.eval(planners.run(prompt, steps))
        return prompt

    def _steps(self, name: str, agent: str, pieces: Sequence[Piece]) -> Steps | None:
        match name:
            case "dense" | "exact" | "repositioned" | "lego":
                plain: Callable[[Sequence[Piece]], Steps] = getattr(planners, name)
                return plain(pieces)
            case "kvcomm-paper":
                planner = Kvcomm(self.papers, agent, read_tail=False, minimum=2, offsets=Paper())
                return planner.plan(pieces) if self._admitted(planner, pieces) else None
            case _:
                return Kvcomm(self.ours, agent, read_tail=name.endswith("tail")).plan(pieces)

    def _admitted(self, planner: Kvcomm, pieces: Sequence[Piece]) -> bool:
        """The paper's gate on every slot; anchors of those it lets through count as used."""
        found = planner.anchors(pieces)
        if found is None:
            return False
        used: list[Anchor] = []
        for piece, anchors in zip((p for p in pieces if p.slot is not None), found, strict=True):
            gate = paper_gate(piece.base, [a.base.unpacked() for a in anchors])
            if not gate.shareable:
                return False
            used += [anchors[i] for i in gate.used]
        self.papers.count(used)
        return True

    def bytes(self, name: str) -> int:
        """What a planner keeps beside the texts themselves."""
        pools = {"kvcomm": self.ours, "kvcomm+tail": self.ours, "kvcomm-paper": self.papers}
        return pools[name].nbytes if name in pools else 0


@dataclass(slots=True)
class Setting:
    """How many questions, and of what length. Bytes are those of a family's anchors at most."""

    anchors: int
    tests: int
    answer: int
    format: str
    budget: int
    calibrations: Path | None
    questions: str


def run(
    model: LoadedModel, names: Sequence[str], rounds: Sequence[str], *, anchors: int, tests: int, answer: int,
    format: str, megabytes: int, calibrations: Path | None, questions: str, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Chain and round: of each family, `anchors` questions make anchors and the next `tests` are measured."""
    setting = Setting(anchors, tests, answer, format, megabytes << 20, calibrations, questions)
    done = [_measured(model, names, r, setting, say) for r in rounds]
    return {
        "schema_version": 2, "model": model.name, "backend": backend(), "format": format, "anchors": anchors,
        "tests": tests, "answer": answer, "questions": questions, "rounds": done, "checks": [c for d in done for c in checks(d)],
    }  # fmt: skip


def _measured(
    model: LoadedModel, names: Sequence[str], name: str, setting: Setting, say: Say
) -> dict[str, Any]:
    agents = list(TASKS)[: ROUNDS[name]]
    scores, pools = {n: Scores() for n in names}, []
    chosen = families(setting.questions)[: None if name == "chain" else ROUND_FAMILIES]
    for family in chosen:
        memory = _taught(model, family, agents, names, setting)
        pools.append({
            "family": family.name, "anchors": len(memory.ours), "bytes": memory.ours.anchor_bytes,
            "sixteen_bits": memory.sixteen_bits(),
        })  # fmt: skip
        say(f"{name}, {family.name}: {len(memory.ours)} anchors, {memory.ours.nbytes / 1e6:.0f} MB")
        questions = family.questions[setting.anchors : setting.anchors + setting.tests]
        for calls in memory.team.rounds(questions, last=True):
            for call in calls[1:]:
                _measure(memory, call, scores)
        _report(f"{name}, up to {family.name}", scores, say)
    rows = [s.row(n, scores["dense"], agents[-1]) for n, s in scores.items() if s.read]
    return {"round": name, "agents": agents, "families": len(chosen), "pools": pools, "rows": rows}


def _taught(
    model: LoadedModel, family: Family, agents: Sequence[str], names: Collection[str], setting: Setting
) -> Memory:
    if len(family.questions) < setting.anchors + setting.tests:
        raise ValueError(f"there are {len(family.questions)} questions about {family.name}")
    roles = {agent: family.roles[agent] for agent in agents}
    team = Team(model, roles, format=setting.format, answer=setting.answer, calibrations=setting.calibrations)
    memory = Memory(team, setting.budget)
    for calls in team.rounds(family.questions[: setting.anchors], last=False):
        for call in calls:
            for pool in memory.pools(names):
                memory.observe(call, pool)
    for agent, template in team.templates.items():
        for slot in template.slots:
            Kvcomm(memory.ours, agent).prepare(slot)
    return memory


def _measure(memory: Memory, call: Call, scores: dict[str, Scores]) -> None:
    wanted = memory.team.predictions(call.prompt, call.answer)
    for name, score in scores.items():
        begun = time.perf_counter()
        made = memory.composed(name, call)
        if made is None:
            # It reads the prompt whole and learns of it.
            score.refused += 1
            if name == "kvcomm-paper":
                memory.observe(call, memory.papers)
            continue
        score.seconds.append((call.agent, time.perf_counter() - begun))
        got = wanted if name == "dense" else memory.team.predictions(made, call.answer)
        score.divergence.append(np.array((mx.exp(wanted) * (wanted - got)).sum(-1)))
        score.agreement.append(np.array(wanted.argmax(-1) == got.argmax(-1)))
        score.read.append(made.read_tokens / len(made))
        score.bytes.append(memory.bytes(name))


def _report(done: str, scores: dict[str, Scores], say: Say) -> None:
    for name, score in scores.items():
        if score.divergence:
            r = score.row(name, scores["dense"], "")
            say(
                f"{done}, {name}: KL {r['kl']:.4f}, first {r['kl_first']:.4f}, same likeliest {r['top1']:.3f} "
                f"({r['top1_error']:.3f}), read {r['read']:.3f}, {r['ttft_ms']:.0f} ms"
            )


def checks(done: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of the default way to compose."""
    found, name = {row["planner"]: row for row in done["rows"]}, done["round"]
    ours = found.get("kvcomm+tail")
    if ours is None:
        return []
    made = [
        check(f"{name}, kvcomm+tail: mean KL to dense", ours["kl"], 0.025, "nats", True),
        check(f"{name}, kvcomm+tail: first token's KL", ours["kl_first"], 0.03, "nats", True),
        check(f"{name}, kvcomm+tail: same likeliest token", ours["top1"], 0.97, "ratio", False),
        check(f"{name}, kvcomm+tail: tokens read", ours["read"], 0.08, "ratio", True),
    ]
    if (moved := found.get("repositioned")) is not None:
        for what, value in (("mean KL", "kl"), ("first", "kl_first")):
            ratio = ours[value] / max(moved[value], NOTHING)
            made.append(check(f"{name}, kvcomm+tail / repositioned: {what}", ratio, 1.0, "ratio", True))
        more = ours["top1"] - moved["top1"]
        made.append(check(f"{name}, kvcomm+tail - repositioned: top 1", more, 0.0, "ratio", False))
    if (blended := found.get("blend")) is not None:
        ratio = ours["kl_first"] / max(blended["kl_first"], NOTHING)
        made.append(check(f"{name}, kvcomm+tail / blend: first", ratio, 1.0, "ratio", True))
    if name == "round":
        share = sum(p["bytes"] for p in done["pools"]) / sum(p["sixteen_bits"] for p in done["pools"])
        made.append(check("round: anchors / the paper's in 16 bits", share, 1 / 8, "ratio", True))
        if backend() == "cpu":
            faster = ours["last_dense_over_this"]
            made.append(check("round: last agent's TTFT, dense / kvcomm+tail", faster, 4.0, "ratio", False))
    return made

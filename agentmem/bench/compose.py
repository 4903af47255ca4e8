"""`bench compose`: what reusing segments behind other text costs the answers, and saves.

Three agents work on a question: the solver answers, the analyst sees the question and that answer, the inspector sees all
three. Questions and answers were read behind other text before. Each planner puts the prompts of the last two together;
compared are its predictions with those of a prompt that was read whole, both held in the daemon's KV format.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.bench.held import held, log_p
from agentmem.compose import planners
from agentmem.compose.anchors import Pool
from agentmem.compose.blend import blend
from agentmem.compose.offsets import Paper
from agentmem.compose.planners import Kvcomm, Piece, Steps
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.template import Filling, Template, encoded
from agentmem.engine.layout import layout
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.quant.device import backend

Say = Callable[[str], None]

PAGE = 64
CARRIER = "<|im_start|>user\nThe question is: "
ASKS = {
    "solver": "The question is: {{question}}\nAnswer briefly.",
    "analyst": "The question is: {{question}}\nThe solver says: {{solver}}\nCheck this answer.",
    "inspector": (
        "The question is: {{question}}\nThe solver says: {{solver}}\nThe analyst says: {{analyst}}\nNow decide."
    ),
}
PLANNERS = (
    "dense", "exact", "repositioned", "lego", "blend", "kvcomm-paper", "kvcomm", "kvcomm+tail",
)  # fmt: skip


@dataclass(slots=True)
class Scores:
    """What one planner did to all tested prompts."""

    divergence: list[np.ndarray] = field(default_factory=list)
    agreement: list[np.ndarray] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, name: str, dense: float) -> dict[str, Any]:
        every = np.concatenate(self.divergence)
        return {
            "planner": name,
            "requests": len(self.divergence),
            "kl": float(every.mean()),
            "kl_p95": float(np.percentile(every, 95)),
            "kl_first": float(np.mean([d[0] for d in self.divergence])),
            "top1": float(np.concatenate(self.agreement).mean()),
            "read": float(np.mean(self.read)),
            "prefill_ms": 1e3 * float(np.mean(self.seconds)),
            "dense_over_this": dense / float(np.mean(self.seconds)),
        }


@dataclass(frozen=True, slots=True)
class Family:
    """Questions of one kind, and what three agents are told to do with them."""

    name: str
    roles: dict[str, str]
    questions: list[str]


def families() -> list[Family]:
    text = resources.files("agentmem.bench").joinpath("chain.toml").read_text(encoding="utf-8")
    return [Family(**family) for family in tomllib.loads(text)["family"]]


class Chain:
    """One model, its templates and anchors, for one family."""

    def __init__(
        self, model: LoadedModel, family: Family, *, format: str, answer: int, budget: int,
        calibrations: Path | None,
    ) -> None:  # fmt: skip
        self._model, self._answer = model, answer
        self._plan = layout(model, format, PAGE, calibrations)
        self._network, self._rotations = Network(model.model), rotations(model.model)
        self._carrier = model.tokenizer.encode(CARRIER)
        self.pool = Pool(budget)
        self.templates = {
            agent: Template.read(self._text(role, ASKS[agent]), model.tokenizer, self.prompt())
            for agent, role in family.roles.items()
        }

    def prompt(self) -> Prompt:
        return Prompt(self._network, self._rotations, self._model.dtype)

    def _text(self, role: str, ask: str) -> str:
        messages = [{"role": "system", "content": role}, {"role": "user", "content": ask}]
        return self._model.tokenizer.render(messages)

    def question(self, text: str) -> Filling:
        return encoded(self.prompt(), self._carrier, self._model.tokenizer.encode(text))

    def calls(self, question: str, last: bool) -> Iterator[tuple[str, list[Piece], Prompt, list[int]]]:
        """The agents' prompts in turn, read whole: (agent, pieces, prompt without its answer, ids of the answer).

        `last`: whether the last agent answers too, whom nobody listens to.
        """
        known = {"question": self.question(question)}
        for agent, template in self.templates.items():
            pieces = template.pieces(known)
            prompt = self.prompt()
            logits = planners.run(prompt, planners.dense(pieces))
            spoken = prompt.copy()
            heard = last or agent != list(self.templates)[-1]
            answer = self._decode(spoken, logits) if heard else []
            yield agent, pieces, prompt, answer
            n = len(prompt)
            known[agent] = Filling(tuple(answer), spoken.state(n, n + len(answer)))

    def _decode(self, prompt: Prompt, logits: mx.array) -> list[int]:
        """A greedy answer, every token of which is read."""
        answer: list[int] = []
        for _ in range(self._answer):
            token = int(np.array(logits.astype(mx.float32)).argmax())
            if token in self._model.tokenizer.eos_ids and answer:
                break
            answer.append(token)
            logits = prompt.read([token])
        return answer

    def predictions(self, prompt: Prompt, following: Sequence[int]) -> mx.array:
        """log p [1 + following, vocab] behind the prompt, whose state but for the last token is held in the format."""
        n = len(prompt) - 1
        layers = []
        for line in prompt.lines:
            assert line.keys is not None
            assert line.values is not None
            layers.append((line.keys[:, :n], line.values[:, :n]))
        table = held(self._plan, prompt.ids[:n], layers, n + 1 + len(following))
        got = log_p(self._model.model(mx.array([[prompt.ids[n], *following]]), cache=table.views())[0])
        mx.eval(got)
        table.release()
        return got

    def composed(self, name: str, agent: str, pieces: Sequence[Piece]) -> Prompt | None:
        """The prompt as a planner makes it; None where it lacks anchors."""
        prompt = self.prompt()
        if name == "blend":
            mx.eval(blend(self._network, prompt, pieces))
            return prompt
        steps = self._steps(name, agent, pieces)
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
                return Kvcomm(self.pool, agent, read_tail=False, offsets=Paper()).plan(pieces)
            case _:
                return Kvcomm(self.pool, agent, read_tail=name.endswith("tail")).plan(pieces)


def run(
    model: LoadedModel, names: Sequence[str], *, anchors: int, tests: int, answer: int, following: int,
    format: str, megabytes: int, calibrations: Path | None, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark: of each family, `anchors` questions make anchors and the next `tests` are measured."""
    scores = {name: Scores() for name in names}
    pools = []
    for family in families():
        if len(family.questions) < anchors + tests:
            raise ValueError(f"there are {len(family.questions)} questions about {family.name}")
        chain = Chain(
            model, family, format=format, answer=answer, budget=megabytes << 20, calibrations=calibrations
        )
        for question in family.questions[:anchors]:
            for agent, pieces, prompt, _ in chain.calls(question, last=False):
                planners.observe(chain.pool, pieces, prompt, agent)
        say(f"{family.name}: {len(chain.pool)} anchors, {chain.pool.nbytes / 1e6:.0f} MB")
        pools.append({"family": family.name, "anchors": len(chain.pool), "bytes": chain.pool.nbytes})
        for question in family.questions[anchors : anchors + tests]:
            for agent, pieces, prompt, continued in chain.calls(question, last=True):
                if agent != "solver":
                    _measure(chain, agent, pieces, prompt, continued[:following], scores)
        _report(family.name, scores, say)
    dense = float(np.mean(scores["dense"].seconds))
    rows = [scores[name].row(name, dense) for name in names if scores[name].read]
    return {
        "schema_version": 1, "model": model.name, "backend": backend(), "format": format, "anchors": anchors,
        "tests": tests, "answer": answer, "following": following, "pools": pools, "rows": rows,
        "checks": checks(rows),
    }  # fmt: skip


def _measure(
    chain: Chain,
    agent: str,
    pieces: list[Piece],
    prompt: Prompt,
    following: list[int],
    scores: dict[str, Scores],
) -> None:
    wanted = chain.predictions(prompt, following)
    for name, score in scores.items():
        begun = time.perf_counter()
        made = chain.composed(name, agent, pieces)
        if made is None:
            continue
        score.seconds.append(time.perf_counter() - begun)
        got = chain.predictions(made, following)
        score.divergence.append(np.array((mx.exp(wanted) * (wanted - got)).sum(-1)))
        score.agreement.append(np.array(wanted.argmax(-1) == got.argmax(-1)))
        score.read.append(made.read_tokens / len(made))


def _report(family: str, scores: dict[str, Scores], say: Say) -> None:
    for name, score in scores.items():
        if score.divergence:
            kl, first = np.concatenate(score.divergence).mean(), np.mean([d[0] for d in score.divergence])
            say(f"up to {family}, {name}: KL {kl:.4f}, first {first:.4f}, read {np.mean(score.read):.3f}")


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised of the default way to compose."""
    found = {row["planner"]: row for row in rows}
    ours = found.get("kvcomm+tail")
    if ours is None:
        return []
    made = [
        check("kvcomm+tail: mean KL to dense", ours["kl"], 0.025, "nats", True),
        check("kvcomm+tail: first token's KL", ours["kl_first"], 0.03, "nats", True),
        check("kvcomm+tail: same likeliest token", ours["top1"], 0.97, "ratio", False),
        check("kvcomm+tail: tokens read", ours["read"], 0.08, "ratio", True),
    ]
    if (moved := found.get("repositioned")) is not None:
        made += [
            check("kvcomm+tail / repositioned: mean KL", ours["kl"] / moved["kl"], 1.0, "ratio", True),
            check(
                "kvcomm+tail / repositioned: first", ours["kl_first"] / moved["kl_first"], 1.0, "ratio", True
            ),
            check("kvcomm+tail - repositioned: top 1", ours["top1"] - moved["top1"], 0.0, "ratio", False),
        ]
    if (blended := found.get("blend")) is not None:
        made.append(
            check("kvcomm+tail / blend: first", ours["kl_first"] / blended["kl_first"], 1.0, "ratio", True)
        )
    return made

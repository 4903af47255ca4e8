"""Agents that work on a question one after the other, each with the question and all answers before its own."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mlx.core as mx

from agentmem.bench import pages
from agentmem.bench.greedy import answers
from agentmem.bench.held import Holder, log_p
from agentmem.compose.anchors import BASE_BITS
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Piece
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State
from agentmem.compose.template import Filling, Template
from agentmem.engine.layout import layout
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network

PAGE = 64
TASKS = {
    "solver": "Answer briefly.",
    "analyst": "Check this answer.",
    "inspector": "Now decide.",
    "critic": "What is still missing?",
    "judge": "Give the final answer.",
}
"""What each agent of a round is asked behind the question and the answers before its own."""


@dataclass(frozen=True, slots=True)
class Family:
    """Questions of one kind, and what the agents are told to do with them."""

    name: str
    roles: dict[str, str]
    questions: list[str]


QUESTIONS = ("chain", "unseen", "pages")
"""Those by which weights were chosen, and others, by which nothing was: other files of families, and a manual by pages."""


def families(questions: str = QUESTIONS[0]) -> list[Family]:
    if questions == "pages":
        return [Family(name, *pages.manual(name)) for name in pages.SUBJECTS]
    text = resources.files("agentmem.bench").joinpath(f"{questions}.toml").read_text(encoding="utf-8")
    return [Family(**family) for family in tomllib.loads(text)["family"]]


def ask(agents: Sequence[str], number: int) -> str:
    """The user's message to an agent, with slots."""
    heard = [f"The {name} says: {{{{{name}}}}}" for name in agents[:number]]
    return "\n".join(["The question is: {{question}}", *heard, TASKS[agents[number]]])


@dataclass(frozen=True, slots=True)
class Spoken:
    """A text as it is kept between prompts: its state where it was first read or said, packed."""

    ids: tuple[int, ...]
    base: PackedState

    @property
    def filling(self) -> Filling:
        return Filling(self.ids, self.base.unpacked())


@dataclass(frozen=True, slots=True)
class Call:
    """One agent's prompt, read whole: without its answer, which is beside it."""

    agent: str
    known: Mapping[str, Spoken]
    prompt: Prompt
    answer: list[int]


class Team:
    """One model, and the templates of agents who all hear each other."""

    def __init__(
        self, model: LoadedModel, roles: Mapping[str, str], *, format: str, answer: int, calibrations: Path | None
    ) -> None:  # fmt: skip
        self.model, self._answer = model, answer
        self.holder = Holder(layout(model, format, PAGE, calibrations))
        self.network, self.rotations = Network(model.model), rotations(model.model)
        self.agents = list(roles)
        self.templates = {
            agent: Template.read(
                self._text(roles[agent], ask(self.agents, n)), model.tokenizer, self.prompt()
            )
            for n, agent in enumerate(self.agents)
        }

    def prompt(self) -> Prompt:
        return Prompt(self.network, self.rotations, self.model.dtype)

    def _text(self, role: str, ask: str) -> str:
        messages = [{"role": "system", "content": role}, {"role": "user", "content": ask}]
        return self.model.tokenizer.render(messages)

    def pieces(self, agent: str, known: Mapping[str, Spoken]) -> list[Piece]:
        """An agent's prompt; unpacks the texts."""
        template = self.templates[agent]
        return template.pieces({slot: known[slot].filling for slot in template.slots})

    def rounds(self, questions: Sequence[str], last: bool) -> list[list[Call]]:
        """For each question the agents' calls in turn. `last`: whether the last agent answers too, whom nobody listens to.

        A question's state is that of its first reader. Answers are greedy, over prompts held in the format.
        """
        ids = [tuple(self.model.tokenizer.encode(q)) for q in questions]
        known: list[dict[str, Spoken]] = [{} for _ in ids]
        calls: list[list[Call]] = [[] for _ in ids]
        for agent in self.agents:
            prompts = [self._read(agent, k, i) for k, i in zip(known, ids, strict=True)]
            if agent == self.agents[0]:
                front = len(self.templates[agent].fixed[0])
                for k, i, prompt in zip(known, ids, prompts, strict=True):
                    k["question"] = self._spoken(i, prompt.state(front, front + len(i)))
            said = self._said(prompts) if last or agent != self.agents[-1] else [([], None)] * len(ids)
            for mine, k, prompt, (answer, state) in zip(calls, known, prompts, said, strict=True):
                mine.append(Call(agent, dict(k), prompt, answer))
                if state is not None:
                    k[agent] = self._spoken(tuple(answer), state)
        return calls

    def _spoken(self, ids: tuple[int, ...], state: State) -> Spoken:
        return Spoken(ids, PackedState.of(state, BASE_BITS))

    def _read(self, agent: str, known: Mapping[str, Spoken], question: tuple[int, ...]) -> Prompt:
        """The prompt, all read but the text in front of the question, which is exact."""
        template, prompt = self.templates[agent], self.prompt()
        texts = [known[s].ids if s in known else question for s in template.slots]
        prompt.put(template.fixed[0], template.bases[0])
        behind = [i for text, fixed in zip(texts, template.fixed[1:], strict=True) for i in (*text, *fixed)]
        prompt.read(behind)
        return prompt

    def _said(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], State | None]]:
        held = [self.holder.restored(p) for p in prompts]
        last = [p.ids[-1] for p in prompts]
        out: list[tuple[list[int], State | None]] = []
        found = answers(self.network, held, last, self._answer, self.model.tokenizer.eos_ids)
        for prompt, (ids, layers) in zip(prompts, found, strict=True):
            turns = zip(self.rotations, layers, strict=True)
            keys = [rotation.unrotate(k, len(prompt)) for rotation, (k, _) in turns]
            state = State.of(keys, [v for _, v in layers])
            mx.eval(state.rows)
            out.append((ids, state))
        return out

    def predictions(self, prompt: Prompt, following: Sequence[int]) -> mx.array:
        """log p [1 + following, vocab] behind the prompt, whose state but for the last token is held in the format."""
        table = self.holder.table(prompt, len(following) + 1)
        got = log_p(self.model.model(mx.array([[prompt.ids[-1], *following]]), cache=table.views())[0])
        mx.eval(got)
        table.release()
        return got

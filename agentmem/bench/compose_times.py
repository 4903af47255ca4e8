"""`bench compose --times-only`: times to the first token in a round of five agents, over random tokens.

Each agent has a system prompt, the question, and the answers of all agents before it. What the model would say does not
matter here, so that it may have random weights. Everything that a prompt needs is timed: texts are unpacked, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.compose import planners
from agentmem.compose.anchors import BASE_BITS, Pool
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Kvcomm, Piece, Steps
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State
from agentmem.model import seam
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.model.products import join_rows
from agentmem.quant.device import backend

Say = Callable[[str], None]
Texts = dict[str, tuple[tuple[int, ...], PackedState]]

PLANNERS = ("dense", "exact", "kvcomm+tail")
AGENTS = 5
SYSTEM, BETWEEN = 512, 8
"""Tokens of an agent's system prompt, and of each other fixed text."""
REPEATS = 3
"""Questions of which medians are reported; one more comes first, for which kernels are compiled."""


class Round:
    """Five agents and what is known of their texts. Slots: the question, and each agent's answer by its number."""

    def __init__(self, model: LoadedModel, question: int, answer: int) -> None:
        seam.install(model.model)
        join_rows(model.model)
        self._model, self._question, self._answer = model, question, answer
        self._network, self._rotations = Network(model.model), rotations(model.model)
        self._rng = np.random.default_rng(0)
        self._slots = [["question", *map(str, range(n))] for n in range(AGENTS)]
        self._fixed = [[self._drawn(SYSTEM), *(self._drawn(BETWEEN) for _ in slots)] for slots in self._slots]
        self._bases: list[list[PackedState]] = []
        self.pool = Pool(1 << 40)

    def _drawn(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(3, self._model.tokenizer.vocab_size, tokens).tolist())

    def _prompt(self) -> Prompt:
        return Prompt(self._network, self._rotations, self._model.dtype)

    def _pieces(self, agent: int, texts: Mapping[str, tuple[tuple[int, ...], PackedState]]) -> list[Piece]:
        fixed, bases = self._fixed[agent], self._bases[agent]
        out = [Piece(fixed[0], bases[0].unpacked())]
        for slot, ids, base in zip(self._slots[agent], fixed[1:], bases[1:], strict=True):
            text, state = texts[slot]
            out.append(Piece(text, state.unpacked(), slot, np.array(text, np.int32).tobytes()))
            out.append(Piece(ids, base.unpacked()))
        return out

    def teach(self) -> None:
        """A question that is read whole by everybody, and becomes an anchor of every slot."""
        self._run(self._observe)

    def times(self, names: Sequence[str]) -> dict[str, list[float]]:
        """A question that each planner puts together: for each the seconds of every agent but the first."""
        found: dict[str, list[float]] = {name: [] for name in names}

        def measure(agent: int, texts: Texts, _: Prompt) -> None:
            for name in names if agent else ():
                prompt, begun = self._prompt(), time.perf_counter()
                mx.eval(planners.run(prompt, self._steps(name, agent, texts)))
                found[name].append(time.perf_counter() - begun)

        self._run(measure)
        return found

    def share(self) -> float:
        """Bytes of the anchors against those of the paper's: keys and values of each text, and each offset, in 16 bits."""
        tokens = sum(
            len(a) + sum(len(s) for o in a.offsets.values() for s in o) for _, a in self.pool.items()
        )
        return self.pool.anchor_bytes / (2 * self._bases[0][0].width * tokens)

    def _steps(self, name: str, agent: int, texts: Texts) -> Steps:
        if name == "dense":
            return [planners.Read(self._ids(agent, texts))]
        if name == "exact":
            front = self._fixed[agent][0]
            state = self._bases[agent][0].unpacked()
            return [planners.Put(front, state), planners.Read(self._ids(agent, texts)[len(front) :])]
        steps = Kvcomm(self.pool, str(agent)).plan(self._pieces(agent, texts))
        assert steps is not None
        return steps

    def _ids(self, agent: int, texts: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[int, ...]:
        fixed = self._fixed[agent]
        pairs = zip(self._slots[agent], fixed[1:], strict=True)
        return fixed[0] + tuple(i for slot, behind in pairs for i in (*texts[slot][0], *behind))

    def _run(self, then: Callable[[int, Texts, Prompt], None]) -> None:
        """One question through all agents; `then` sees each agent's number, its texts, and its prompt, read whole."""
        texts: dict[str, Any] = {"question": (self._drawn(self._question), None)}
        for agent in range(AGENTS):
            prompt = self._prompt()
            prompt.read(self._ids(agent, texts))
            if len(self._bases) == agent:
                self._bases.append(self._of_fixed(agent, texts, prompt))
            if agent == 0:
                stop = SYSTEM + self._question
                texts["question"] = (texts["question"][0], _packed(prompt.state(SYSTEM, stop)))
            then(agent, texts, prompt)
            answer, at = self._drawn(self._answer), len(prompt)
            prompt.read(answer)
            texts[str(agent)] = (answer, _packed(prompt.state(at, len(prompt))))
            mx.clear_cache()

    def _of_fixed(self, agent: int, texts: Mapping[str, Any], prompt: Prompt) -> list[PackedState]:
        out, at = [], 0
        for number, fixed in enumerate(self._fixed[agent]):
            at += len(texts[self._slots[agent][number - 1]][0]) if number else 0
            out.append(_packed(prompt.state(at, at + len(fixed))))
            at += len(fixed)
        return out

    def _observe(self, agent: int, texts: Texts, prompt: Prompt) -> None:
        if agent:
            planners.observe(self.pool, self._pieces(agent, texts), prompt, str(agent))


def _packed(state: State) -> PackedState:
    return PackedState.of(state, BASE_BITS)


def run(
    model: LoadedModel, names: Sequence[str], *, question: int, answer: int, anchors: int, say: Say
) -> dict[str, Any]:
    """`anchors` questions are read whole; then some are put together."""
    team = Round(model, question, answer)
    for number in range(anchors):
        begun = time.perf_counter()
        team.teach()
        say(f"anchor {number + 1} of {anchors}: {time.perf_counter() - begun:.1f} s")
    rounds = [team.times(names) for _ in range(1 + REPEATS)][1:]
    seconds = {
        name: [statistics.median(agent) for agent in zip(*(r[name] for r in rounds), strict=True)]
        for name in names
    }
    rows, share = [_row(name, each, seconds["dense"]) for name, each in seconds.items()], team.share()
    return {
        "schema_version": 1, "model": model.name, "backend": backend(), "question": question, "answer": answer,
        "anchors": anchors, "system": SYSTEM, "bytes": team.pool.nbytes, "anchor_bytes": team.pool.anchor_bytes,
        "anchors_over_16_bits": share, "rows": rows, "checks": checks(rows, share),
    }  # fmt: skip


def _row(name: str, each: list[float], dense: list[float]) -> dict[str, Any]:
    """Figures of the last agent, and of all from the second on."""
    return {
        "planner": name,
        "ttft_ms": [1e3 * s for s in each],
        "last_ttft_ms": 1e3 * each[-1],
        "last_dense_over_this": dense[-1] / each[-1],
        "rest_ms": 1e3 * sum(each),
        "rest_dense_over_this": sum(dense) / sum(each),
    }


def checks(rows: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """What is promised of a GPU; `share`: of the paper's bytes."""
    ours = next((r for r in rows if r["planner"] == "kvcomm+tail"), None)
    if ours is None or backend() != "cuda":
        return []
    last, rest = ours["last_dense_over_this"], ours["rest_dense_over_this"]
    return [
        check("last agent's TTFT, dense / kvcomm+tail", last, 5.0, "ratio", False),
        check("TTFT of agents 2 to 5, dense / kvcomm+tail", rest, 2.0, "ratio", False),
        check("anchors / the paper's in 16 bits", share, 1 / 8, "ratio", True),
    ]

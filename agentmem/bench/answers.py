"""What compression did to answers: one record a question and policy, and the table of many of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.bench.checks import check

BASELINES = ("streaming", "keydiff", "snapkv", "infinipot", "kvzip")
RESAMPLES = 4000
QUESTIONS = 60


@dataclass(frozen=True, slots=True)
class Record:
    """One question answered over one cache, `tokens` in its gold answer. kl: nats a token, full against compressed cache.

    top1: share of tokens whose likeliest one is the full cache's; nll: nats a token of the gold answer; exact: greedy decoding
    would say it. planted: the answer is a planted fact; exact then says
    whether it was likelier than all else of its kind that was said.
    """

    conversation: str
    question: int
    compression: int
    policy: str
    kl: float
    top1: float
    nll: float
    exact: bool
    planted: bool
    tokens: int


class Journal:
    """Records as they come, a line of JSON each, so that a run may end anywhere and go on; without a path in memory alone."""

    def __init__(self, path: Path | None = None, setting: Mapping[str, Any] | None = None) -> None:
        """`setting`, what JSON can say, is the first line. Raises ValueError for a file of another one."""
        self._path, self.records = path, list[Record]()
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps({"setting": setting}) + "\n", encoding="utf-8")
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != {"setting": setting}:
            raise ValueError(f"{path} is of other settings ({first}); name another file")
        self.records = [Record(**json.loads(line)) for line in lines]

    def has(self, conversation: str, compression: int, policy: str) -> bool:
        wanted = conversation, compression, policy
        return any((r.conversation, r.compression, r.policy) == wanted for r in self.records)

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(r)) + "\n" for r in records)


def ratio(one: Sequence[Record], other: Sequence[Record], seed: int = 0) -> tuple[float, float, float]:
    """The ratio of two mean KLs, over tokens of the same questions, and the 95 % interval of a bootstrap of their pairs."""
    assert [r.question for r in one] == [r.question for r in other]
    a, b = (np.array([r.kl * r.tokens for r in own]) for own in (one, other))
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = a[drawn].sum(axis=1) / np.maximum(b[drawn].sum(axis=1), 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(a.sum() / max(b.sum(), 1e-12)), float(low), float(high)


def over_tokens(records: Sequence[Record], values: Sequence[float]) -> float:
    """The mean over all tokens of a value that each record has a token."""
    return float(np.average(values, weights=[r.tokens for r in records]))


class Table:
    """Records of any number of runs, looked up by policy."""

    def __init__(self, records: Sequence[Record]) -> None:
        found: dict[tuple[int, bool, str], dict[tuple[str, int], Record]] = {}
        for r in records:
            own = found.setdefault((r.compression, r.planted, r.policy), {})
            own[r.conversation, r.question] = r
        self._found = found
        self.compressions = sorted({c for c, _, _ in found}, reverse=True)

    def policies(self, compression: int, planted: bool) -> list[str]:
        return [p for c, f, p in self._found if (c, f) == (compression, planted)]

    def paired(self, compression: int, planted: bool, *policies: str) -> list[list[Record]]:
        """Records of these policies, of the questions that all of them answered; nothing where one answered none."""
        each = [self._found.get((compression, planted, p), {}) for p in policies]
        common = sorted(set(each[0]).intersection(*each[1:]))
        return [[own[key] for key in common] for own in each]

    def rows(self) -> list[dict[str, Any]]:
        out = []
        for (compression, planted, policy), own in self._found.items():
            every = list(own.values())
            kl, counts = np.array([r.kl for r in every]), np.array([r.tokens for r in every])
            drawn = np.random.default_rng(0).integers(0, len(kl), (RESAMPLES, len(kl)))
            means = (kl * counts)[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
            low, high = np.percentile(means, [2.5, 97.5])
            out.append({
                "compression": compression, "planted": planted, "policy": policy, "questions": len(every),
                "tokens": int(counts.sum()), "kl": over_tokens(every, [r.kl for r in every]), "kl_low": float(low),
                "kl_high": float(high), "top1": over_tokens(every, [r.top1 for r in every]),
                "nll": over_tokens(every, [r.nll for r in every]), "exact": float(np.mean([r.exact for r in every])),
                "kl_of_questions": float(kl.mean()),
            })  # fmt: skip
        return out

    def compared(self, compression: int, one: str, other: str) -> dict[str, Any] | None:
        """The ratio of two policies' mean KL over questions, with its interval."""
        a, b = self.paired(compression, False, one, other)
        if not a:
            return None
        value, low, high = ratio(a, b)
        return {
            "compression": compression, "policies": [one, other], "ratio": value, "low": low, "high": high,
            "questions": len(a),
        }  # fmt: skip

    def comparisons(self) -> list[dict[str, Any]]:
        """Every baseline, and what a promise is about, at each compression."""
        pairs = [("matched", b) for b in (*BASELINES, "random", "mismatched", "kvzip-stored", "question")]
        pairs += [(p, "matched") for p in ("views", "views by blocks", "folded")] + [("folded", "views")]
        pairs += [("packed views", "views"), ("packed matched", "matched"), ("views", "mismatched views")]
        pairs += [(p, "views") for p in ("views of even heads", "views by layers")]
        made = [self.compared(c, one, other) for c in self.compressions for one, other in pairs]
        return [m for m in made if m is not None]

    def best_baseline(self, compression: int) -> str | None:
        """The baseline of the least mean KL, over questions that all of those measured answered."""
        names = [p for p in BASELINES if p in self.policies(compression, False)]
        if not names:
            return None
        each = self.paired(compression, False, *names)
        return (
            names[int(np.argmin([over_tokens(own, [r.kl for r in own]) for own in each]))]
            if each[0]
            else None
        )

    def checks(self) -> list[dict[str, Any]]:
        made = [c for compression in self.compressions for c in self._checks_at(compression)]
        fewest = [len(self.paired(c, False, "full")[0]) for c in self.compressions]
        if any(fewest):
            made.append(check("questions", float(max(fewest)), QUESTIONS, "questions", False))
        return made

    def _checks_at(self, compression: int) -> list[dict[str, Any]]:
        best, made = self.best_baseline(compression), []
        wanted = [("matched", best, 0.75)] if best else []
        wanted += [
            ("matched", "mismatched", 0.9), ("views", "matched", 1.1), ("views by blocks", "matched", 1.1),
            ("folded", "matched", 1.1),
            ("packed views", "views", 1.1), ("packed matched", "matched", 1.1),
        ]  # fmt: skip
        for one, other, bound in wanted:
            if (found := self.compared(compression, one, other)) is not None:
                name = f"{compression}x, KL {one} / {other}"
                made.append(check(name, found["ratio"], bound, "ratio", True))
        for policy in ("matched", "views"):
            ours, full = self.paired(compression, True, policy, "full")
            if compression == 4 and ours and any(r.exact for r in full):
                recall = sum(r.exact for r in ours) / sum(r.exact for r in full)
                made.append(check(f"4x, planted facts, {policy} / full", recall, 0.9, "ratio", False))
        return made

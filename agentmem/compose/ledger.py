"""What is known of how well prompts of one template are composed: calibration, audits, and the prompts to measure them on."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

PAIRS = 20
KL = 0.05
AUDITS = 20
CASES = 64
TEMPLATES = 256


@dataclass(frozen=True, slots=True)
class Bounds:
    """What `auto` asks for: pairs of a dense and a composed run, and their mean KL in nats at most."""

    pairs: int = PAIRS
    kl: float = KL


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt run densely and composed: KL in nats, mean over tokens and at the first; share of equal top tokens."""

    kl: float
    first_kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Means over `pairs` pairs."""

    pairs: int
    kl: float
    first_kl: float
    top1: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Calibration:
        return cls(
            len(pairs),
            fmean(p.kl for p in pairs),
            fmean(p.first_kl for p in pairs),
            fmean(p.top1 for p in pairs),
        )


@dataclass(slots=True)
class Record:
    """One template and planner. audits: KL of the last ones; demoted: their mean went over the bound."""

    calibration: Calibration | None = None
    audits: deque[float] = field(default_factory=lambda: deque(maxlen=AUDITS))
    demoted: bool = False


Case = tuple[bytes, ...]
"""What filled the slots of a prompt: the hashes of its segments."""


@dataclass(slots=True)
class Entry:
    """A template: ids of its `fixed` text, who has prompts of it, what planners do to it, and its last prompts.

    seen: the ledger's count of prompts when it was seen last.
    """

    fixed: tuple[tuple[int, ...], ...]
    seen: int = 0
    owners: set[str] = field(default_factory=set)
    records: dict[str, Record] = field(default_factory=dict)
    cases: OrderedDict[Case, None] = field(default_factory=OrderedDict)

    def json(self) -> dict[str, Any]:
        return {
            "fixed": [list(ids) for ids in self.fixed],
            "seen": self.seen,
            "owners": sorted(self.owners),
            "records": {
                planner: {
                    "calibration": asdict(r.calibration) if r.calibration else None,
                    "audits": list(r.audits),
                    "demoted": r.demoted,
                }
                for planner, r in self.records.items()
            },
            "cases": [[text.hex() for text in case] for case in self.cases],
        }

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Entry:
        records = {
            planner: Record(
                Calibration(**r["calibration"]) if r["calibration"] else None,
                deque(r["audits"], maxlen=AUDITS),
                r["demoted"],
            )
            for planner, r in data["records"].items()
        }
        cases = OrderedDict.fromkeys(tuple(bytes.fromhex(t) for t in case) for case in data["cases"])
        fixed = tuple(tuple(ids) for ids in data["fixed"])
        return cls(fixed, data["seen"], set(data["owners"]), records, cases)


Key = tuple[str, bytes]
"""A namespace and the hash of a template."""


class Ledger:
    """The templates of all namespaces, those that were seen last at the end. Engine thread only.

    `changed`: entries to be written.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.entries: OrderedDict[Key, Entry] = OrderedDict()
        self.changed: set[Key] = set()
        self._seen = 0

    def adopt(self, entries: Mapping[Key, Entry]) -> None:
        """Take in what was kept."""
        self.entries = OrderedDict(sorted(entries.items(), key=lambda item: item[1].seen))
        self._seen = max((e.seen for e in entries.values()), default=0)

    def saw(
        self, namespace: str, template: bytes, fixed: Iterable[tuple[int, ...]], case: Case, agent: str
    ) -> None:
        """A prompt of this template was composed, or taught."""
        key = (namespace, template)
        entry = self.entries.setdefault(key, Entry(tuple(fixed)))
        self.entries.move_to_end(key)
        self._seen += 1
        entry.seen = self._seen
        entry.owners.add(agent)
        entry.cases[case] = None
        entry.cases.move_to_end(case)
        while len(entry.cases) > CASES:
            entry.cases.popitem(last=False)
        self.changed.add(key)
        if len(self.entries) > TEMPLATES:
            self._drop(next((k for k, e in self.entries.items() if not e.records), next(iter(self.entries))))

    def cases(self, namespace: str, template: bytes) -> list[Case]:
        """The last prompts of a template, the latest at the end."""
        entry = self.entries.get((namespace, template))
        return list(entry.cases) if entry is not None else []

    def calibrate(self, namespace: str, template: bytes, planner: str, pairs: Sequence[Pair]) -> Calibration:
        """Record what was measured; what was before is void, a demotion too. Precondition: the template was seen."""
        record = self._record(namespace, template, planner)
        record.calibration = Calibration.of(pairs)
        record.audits.clear()
        record.demoted = False
        return record.calibration

    def audit(self, namespace: str, template: bytes, planner: str, kl: float) -> None:
        """A composed prompt was run densely too. The template is demoted when the mean of the last audits exceeds the bound."""
        record = self._record(namespace, template, planner)
        record.audits.append(kl)
        if fmean(record.audits) > self.bounds.kl:
            record.demoted = True

    def may_compose(self, namespace: str, template: bytes, planner: str) -> bool:
        return not self.why_not(namespace, template, planner)

    def why_not(self, namespace: str, template: bytes, planner: str) -> str:
        """What keeps `auto` from composing this template; "" when nothing does."""
        entry = self.entries.get((namespace, template))
        record = entry.records.get(planner) if entry is not None else None
        if record is None or record.calibration is None:
            return "this template is not calibrated"
        found = record.calibration
        if found.pairs < self.bounds.pairs:
            return f"this template is calibrated on {found.pairs} pairs, {self.bounds.pairs} are asked for"
        if not found.kl <= self.bounds.kl:
            return f"this template's calibration found a KL of {found.kl:.3f}, allowed are {self.bounds.kl}"
        if record.demoted:
            return "audits demoted this template; calibrate it anew"
        return ""

    def forget(self, namespace: str, agent: str | None = None) -> None:
        """Forget the templates of a namespace, or those that only this agent has."""
        for key in [k for k in self.entries if k[0] == namespace]:
            owners = self.entries[key].owners
            owners.difference_update(owners if agent is None else {agent})
            if owners:
                self.changed.add(key)
            else:
                self._drop(key)

    def _record(self, namespace: str, template: bytes, planner: str) -> Record:
        self.changed.add((namespace, template))
        return self.entries[namespace, template].records.setdefault(planner, Record())

    def _drop(self, key: Key) -> None:
        del self.entries[key]
        self.changed.add(key)

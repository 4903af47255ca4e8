"""`verify MODEL`: what KV formats cost a model, with the packed cache in the loop, and which of them it should use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.bench.cases import Case, calls, needles, texts
from agentmem.bench.checks import check
from agentmem.bench.walk import Walk
from agentmem.engine.layout import Layout, layout
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend
from agentmem.quant.format import kv_format

Say = Callable[[str], None]

PARTS = ("predictions", "perplexity", "cases")
PAGE, CHUNK = 64, 128
HISTORY, FED = 640, 128
"""Tokens of a text that are held, at least, and those that are predicted over them."""
WINDOW = 2048
REPLY = 12
BASE, PLAIN, DEFAULT = "fp16", "q4-stock", "q4"
MOST_BITS, MOST_BITS_OF_THREE, MOST_KL_SHARE, MOST_PERPLEXITY = 4.7, 3.8, 0.25, 1.0
SAMPLES = 2000


def measure(
    model: LoadedModel, names: Sequence[str], *, own: Mapping[str, str] | None = None, quick: bool = False,
    parts: Sequence[str] = PARTS, calibrations: Path | None = None, say: Say = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of each format, or some `parts` of them; `own` texts instead of ours.

    Raises ValueError for formats that do not fit the model, and where no text is long enough.
    """
    wanted = list(dict.fromkeys([BASE, *names]))
    plans = {name: layout(model, name, PAGE, calibrations) for name in wanted}
    read = _long_enough(model, own or texts())
    if quick:
        read = dict(list(read.items())[:3])
    rows = {name: _row(name, plans[name]) for name in wanted}
    if "predictions" in parts:
        base = _predictions(model, plans[BASE], read, say)
        for name in wanted:
            got = base if name == BASE else _predictions(model, plans[name], read, say)
            rows[name] |= _divergence(base, got)
        for row in rows.values() if PLAIN in rows else ():
            row["kl_of_plain"] = interval(row["kl_texts"], ratio_to=rows[PLAIN]["kl_texts"])
    tokens = WINDOW if quick else 8 * 1024 + 1
    for name in wanted if "perplexity" in parts else ():
        rows[name]["perplexity"] = _perplexity(model, plans[name], read, tokens, say)
        rows[name]["perplexity_change"] = 100 * (rows[name]["perplexity"] / rows[BASE]["perplexity"] - 1)
    asked = [*needles(4 if quick else 36), *calls(3 if quick else 24)] if "cases" in parts else []
    answers = {name: {c.name: _answered(model, plans[name], c, say) for c in asked} for name in wanted}
    for name in wanted if asked else ():
        rows[name] |= _cases(asked, answers[BASE], answers[name])
    best = recommended(list(rows.values())) if "predictions" in parts else None
    return {
        "schema_version": 1, "model": model.name, "backend": backend(), "texts": list(read), "history": HISTORY, "fed": FED,
        "cases": len(asked), "perplexity_tokens": tokens, "rows": list(rows.values()), "recommended": best,
        "checks": checks(rows, len(read), len(asked)),
    }  # fmt: skip


def _row(name: str, plan: Layout) -> dict[str, Any]:
    """Bits of an element far from the first page, scales and biases included."""
    g = plan.geometry
    return {"format": name, "bits": 16 * g.packed_row_bytes / g.raw_row_bytes}


def _long_enough(model: LoadedModel, found: Mapping[str, str]) -> dict[str, list[int]]:
    """Token ids of the texts that have enough of them. Raises ValueError when there is none."""
    ids = {name: model.tokenizer.encode(text) for name, text in found.items()}
    long = {name: one for name, one in ids.items() if len(one) >= HISTORY + FED}
    if not long:
        raise ValueError(f"no text has {HISTORY + FED} tokens")
    return long


def _predictions(
    model: LoadedModel, plan: Layout, read: Mapping[str, list[int]], say: Say
) -> dict[str, np.ndarray]:
    """Log probabilities [FED, vocab] behind `HISTORY` tokens of each text; what was read before is packed by then."""
    out = {}
    for name, ids in read.items():
        walk = Walk(model, plan, HISTORY + FED)
        walk.read(ids[:HISTORY], CHUNK, rows=False)
        out[name] = walk.read(ids[HISTORY : HISTORY + FED], FED)
        walk.end()
        say(f"{plan.geometry.format.name}: {name}")
    return out


def _divergence(base: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> dict[str, Any]:
    lost = {name: (np.exp(p) * (p - got[name])).sum(-1) for name, p in base.items()}
    whole = np.concatenate(list(lost.values()))
    same = np.concatenate([p.argmax(-1) == got[name].argmax(-1) for name, p in base.items()])
    means = [float(x.mean()) for x in lost.values()]
    return {
        "kl": float(whole.mean()),
        "kl_interval": interval(means),
        "kl_p95": float(np.percentile(whole, 95)),
        "kl_first": float(np.mean([x[0] for x in lost.values()])),
        "kl_texts": means,
        "top1": float(same.mean()),
    }


def interval(values: Sequence[float], ratio_to: Sequence[float] | None = None) -> list[float]:
    """95 % of the means of resampled texts (bootstrap), or of the ratios of two means over the same texts."""
    rng, own = np.random.default_rng(0), np.array(values)
    picks = rng.integers(0, len(own), (SAMPLES, len(own)))
    means = own[picks].mean(1)
    if ratio_to is not None:
        means = means / np.maximum(np.array(ratio_to)[picks].mean(1), 1e-12)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def _perplexity(
    model: LoadedModel, plan: Layout, read: Mapping[str, list[int]], tokens: int, say: Say
) -> float:
    """Of texts put end to end, in windows as long as the model's context allows, up to `WINDOW` tokens."""
    ids = [i for one in read.values() for i in one][:tokens]
    size = min(WINDOW, model.max_context - 1)
    lost, count = 0.0, 0
    for at in range(0, len(ids) - 1, size):
        window = ids[at : at + size + 1]
        walk = Walk(model, plan, len(window))
        predicted = walk.read(window[:-1], 4 * CHUNK)
        walk.end()
        lost -= float(predicted[np.arange(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
        say(f"{plan.geometry.format.name}: perplexity of {count} tokens {math.exp(lost / count):.3f}")
    return math.exp(lost / count)


def _answered(model: LoadedModel, plan: Layout, case: Case, say: Say) -> Any:
    """A needle: whether the reply has it. A call: which of the tokens of its arguments are the likeliest where they stand."""
    tokenizer = model.tokenizer
    tools = [*case.tools] or None
    prompt = tokenizer.encode(tokenizer.render([*case.messages], tools=tools))
    walk = Walk(model, plan, len(prompt) + 256)
    last = walk.read(prompt, CHUNK, rows=False)
    if not case.tools:
        said = tokenizer.decode(walk.say(last, REPLY, sorted(tokenizer.eos_ids)))
        found: Any = case.answer in said
    else:
        head = case.answer[: case.answer.index(case.arguments)]
        ids = tokenizer.encode(f"<tool_call>\n{head}")
        following = tokenizer.encode(case.arguments)
        walk.read(ids[:-1], CHUNK, rows=False)
        predicted = walk.read([ids[-1], *following[:-1]], CHUNK)
        found = (predicted.argmax(-1) == np.array(following)).tolist()
    walk.end()
    say(f"{plan.geometry.format.name}: {case.name}")
    return found


def _cases(asked: Sequence[Case], base: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, Any]:
    """`lost`: what the base gets right and this format does not: a needle, or a token of a call's arguments."""
    right = [c for c in asked if not c.tools and base[c.name]]
    tokens = [(c.name, i) for c in asked if c.tools for i, ok in enumerate(base[c.name]) if ok]
    whole = [c for c in asked if c.tools and all(base[c.name])]
    lost = [c.name for c in right if not got[c.name]]
    lost += sorted({name for name, i in tokens if not got[name][i]})
    said = [ok for c in asked if c.tools for ok in got[c.name]]
    return {
        "needles": sum(bool(got[c.name]) for c in asked if not c.tools),
        "needles_right_at_16_bits": len(right),
        "argument_accuracy": float(np.mean(said)) if said else None,
        "calls_whole": sum(all(got[c.name]) for c in asked if c.tools),
        "calls_whole_at_16_bits": len(whole),
        "lost": lost,
    }


def recommended(rows: Sequence[dict[str, Any]]) -> str | None:
    """The format that diverges least of those of at most `MOST_BITS` bits."""
    small = [row for row in rows if row["bits"] <= MOST_BITS]
    return min(small, key=lambda row: row["kl"])["format"] if small else None


def checks(rows: Mapping[str, dict[str, Any]], read: int, asked: int) -> list[dict[str, Any]]:
    """What is promised of the default format, and of three bits."""
    found, default = [], rows.get(DEFAULT, {})
    plain, three = rows.get(PLAIN, {}).get("kl", 0.0), rows.get("q3", {})
    if default:
        found.append(check("bits of an element, q4", default["bits"], MOST_BITS, "bits", True))
    if "kl" in default and plain:
        found.append(
            check(
                f"mean KL of q4 / of plain 4 bits, {read} texts",
                default["kl"] / plain,
                MOST_KL_SHARE,
                "ratio",
                True,
            )
        )
    if "perplexity_change" in default:
        change = abs(default["perplexity_change"])
        found.append(check("perplexity change of q4 on long windows", change, MOST_PERPLEXITY, "%", True))
    if "lost" in default:
        found.append(
            check(f"of {asked} cases that 16 bits get right, lost by q4", len(default["lost"]), 0, "", True)
        )
    if "kl" in three and plain:
        found.append(check("bits of an element, q3", three["bits"], MOST_BITS_OF_THREE, "bits", True))
        found.append(check("mean KL of q3 / of plain 4 bits", three["kl"] / plain, 1.0, "ratio", True))
    return found


def verdict(row: Mapping[str, Any]) -> str:
    """ "ok", or why a format of this figures is not to be trusted with answers."""
    if kv_format(row["format"].split(",")[0]).packs and row["kl"] > 0.1:
        return f"its predictions diverge by {row['kl']:.3f} nats"
    if row["perplexity_change"] > 3 * MOST_PERPLEXITY:
        return f"perplexity grows by {row['perplexity_change']:.1f} %"
    if len(row["lost"]) > 2:
        return f"it loses {len(row['lost'])} cases that 16 bits get right"
    return "ok"

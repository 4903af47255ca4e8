"""`bench episodic`: its options and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentmem.bench.command import BITS, MODEL, SHAPE, Result, benchmark, checks, model_of, numbers, say
from agentmem.home import Home, default_home

if TYPE_CHECKING:
    from agentmem.bench.transcripts import Dialogue


def _lived_table(result: Result) -> str:
    lines = ["history   tokens  first token  rows stay  rows at most"]
    lines += [
        f"{r['times']:6d}x {r['tokens']:8d} {r['ttft_ms']:9.1f} ms {r['resident_tokens']:10d} {r['peak_rows']:13.0f}"
        for r in result["rows"]
    ]
    return "\n".join([*lines, checks(result)])


def _table(result: Result) -> str:
    if "switch" in result:
        return _lived_table(result)
    if "rows" in result and "comparisons" not in result:
        from agentmem.bench.routing import table

        return "\n".join([table(result), *result["notes"], checks(result)])
    lines = ["compression  policy                            KL   (95 %)           top-1   exact  questions"]
    lines += [
        f"{r['compression']:10d}x  {r['policy'] + (', planted' if r['planted'] else ''):30s} {r['kl']:6.3f}  "
        f"({r['kl_low']:5.3f}..{r['kl_high']:5.3f})  {r['top1']:6.3f}  {r['exact']:6.3f}  {r['questions']:9d}"
        for r in result["rows"]
    ]
    lines += [
        f"{c['compression']}x: {c['policies'][0]} / {c['policies'][1]} {c['ratio']:.3f} ({c['low']:.3f}..{c['high']:.3f})"
        for c in result["comparisons"]
    ]
    for c in result["conversations"]:
        switch = "" if c["switch_ms"] is None else f", {c['switch_ms']:.1f} ms a switch"
        lines.append(
            f"{c['name']}: {c['tokens']} tokens, {c['episodes']} episodes, {c['hits']} of {c['questions']} questions "
            f"at their evidence{switch}, {max(c['peak_mb'].values(), default=0):.0f} MB at most"
        )
    return "\n".join([*lines, *result["notes"], checks(result)])


@benchmark(
    _table,
    MODEL,
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="A file of conversations with questions, in the form of LoCoMo's. Without it generated ones are measured alone.",
    ),
    click.option("--conversation", "names", multiple=True, help="One of the file's conversations; repeatable."),
    click.option("--sessions", default=3, type=click.IntRange(1), help="First sessions of each."),
    click.option("--questions", type=click.IntRange(1), help="Questions about each at most; all by default."),
    click.option("--generated", default=2, type=click.IntRange(0), help="Generated conversations with planted facts."),
    click.option("--policy", "policies", multiple=True, help="A policy to measure; repeatable. Default: all."),
    click.option(
        "--compression",
        "compressions",
        default="8,4",
        callback=numbers("ratios", "8,4", 2, 64),
        help="A budget is a history's tokens by this.",
    ),
    click.option("--episodes", default=3, type=click.IntRange(1, 8), help="Episodes of a conversation."),
    click.option("--representatives", default=8, type=click.IntRange(1), help="Segments in a patched prompt."),
    click.option("--block", default=512, type=click.IntRange(16), help="Tokens between two evictions."),
    click.option("--heads", type=click.Choice(["ragged", "uniform"]), default="ragged", help="Who shares a budget."),
    click.option("--format", default="q4", show_default=True, help="KV format of packed rows."),
    click.option("--encoder", default="minilm", show_default=True, help="minilm, hash512, a folder or org/name."),
    click.option(
        "--routing", is_flag=True, help="Only how often a question's episode holds its evidence; runs no language model."
    ),
    SHAPE,
    BITS,
    click.option("--lived", is_flag=True, help="Only turns of the daemon: first token, rows in RAM, a change of episode."),
    click.option("--budget", default=2048, type=click.IntRange(256), help="Rows of an episode, for --lived."),
    click.option(
        "--times",
        default="4,16",
        callback=numbers("ratios", "4,16", 2, 64),
        help="A history's tokens are as many times the budget, for --lived.",
    ),
    click.option("--prompt-tokens", default=1024, type=click.IntRange(64), help="Tokens of a patched prompt at most."),
    click.option(
        "--journal",
        type=click.Path(path_type=Path),
        help="A file of measured answers: a run adds to it, and measures only what it lacks.",
    ),
)  # fmt: skip
def episodic(
    model: str, data: Path | None, names: tuple[str, ...], generated: int, policies: tuple[str, ...],
    compressions: list[int], encoder: str, journal: Path | None, heads: str, prompt_tokens: int, routing: bool,
    shape: str | None, bits: str, lived: bool, budget: int, times: list[int], **options: Any,
) -> Result:  # fmt: skip
    """Long conversations in a small budget: episodes, and what they are compared with, against the full cache."""
    from agentmem.bench.answers import Journal
    from agentmem.bench.dialogues import generated as dialogue
    from agentmem.bench.episodic import POLICIES, Ground, Setting, run
    from agentmem.bench.locomo import read
    from agentmem.episode.encoder import encoder_of
    from agentmem.episode.selection import Heads

    if lived:
        from agentmem.bench.lived import measure

        return measure(
            model_of(model, shape, bits), options["format"], budget, options["block"], times, 5, say
        )
    if unknown := set(policies) - set(POLICIES):
        raise click.BadParameter(f"there is no policy {min(unknown)!r}; there are {', '.join(POLICIES)}")
    try:
        given = data is not None and data.exists()
        dialogues = read(data) if data is not None and given else []
        notes = [] if given else ["No data was given: these are generated conversations alone."]
        if not given:
            say(f"there is no {data or '--data'}: generated conversations are measured alone")
        if missing := set(names) - {d.name for d in dialogues}:
            raise ValueError(f"there is no conversation {min(missing)!r} in the data")
        dialogues = [d for d in dialogues if not names or d.name in names]
        if routing:
            return _routing(dialogues, encoder, generated, notes)
        home = Home(default_home())
        ground = Ground(model_of(model), encoder_of(encoder), options["format"], home.calibration)
        setting = Setting(policies or POLICIES, heads=Heads(heads), prompt_limit=prompt_tokens, **options)
        dialogues += [dialogue(seed) for seed in range(generated)]
        about = {
            "model": model,
            "encoder": encoder,
            "heads": heads,
            "prompt_tokens": prompt_tokens,
            **options,
        }
        kept = Journal(journal, about)
        result = run(ground, dialogues, compressions, setting, kept, say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return result | {"notes": notes}


def _routing(labelled: Sequence[Dialogue], encoder: str, generated: int, notes: list[str]) -> Result:
    """Hit rates on labelled conversations, if there are any, and on ten times as many generated ones as elsewhere."""
    from agentmem.bench.dialogues import generated as dialogue
    from agentmem.bench.routing import run
    from agentmem.episode.encoder import HashedEncoder, encoder_of

    names = dict.fromkeys((encoder, HashedEncoder.name))
    sets = {"locomo": labelled, "planted": [dialogue(seed) for seed in range(10 * generated)]}
    there = {name: dialogues for name, dialogues in sets.items() if dialogues}
    return run([encoder_of(name) for name in names], there, say=say) | {"notes": notes}

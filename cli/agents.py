"""`agents`, `show`, `fork`, `append`, `warm`, `evict`, `forget`, `models`: what is remembered, and for whom."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import click

from agentmem.cli import jobs
from agentmem.cli.memory import in_words
from agentmem.cli.output import (
    console,
    format_ago,
    format_bytes,
    format_count,
    format_ms,
    format_share,
    json_option,
    print_facts,
    print_json,
    print_table,
)
from agentmem.cli.text_input import read_text
from agentmem.client import AgentMemClient

COLUMNS = ("AGENT", "MODEL", "TOKENS", "UNIQUE", "SHARED", "STATE", "HIT%", "SAVED", "LAST", "LINEAGE")


@click.command()
@json_option
def agents(as_json: bool) -> None:
    """List the agents: context, bytes on disk, and how much of what was asked was remembered.

    UNIQUE is what only this agent uses on disk, SHARED what others use too. STATE is hot (in RAM), warm (on disk) or
    cold (only the tokens are kept). SAVED is measured prefill time.
    """
    with AgentMemClient() as client:
        found = client.agents()
        store = client.store()
    if as_json:
        print_json({"agents": found})
        return
    if not found:
        click.echo('no agents yet; try: agentmem run planner "Hello"')
        return
    print_table(COLUMNS, map(_row, found), right=("TOKENS", "UNIQUE", "SHARED", "HIT%", "SAVED"))
    click.echo(f"{len(found)} agent{'' if len(found) == 1 else 's'} · {_totals(store)}")


def _totals(store: dict[str, Any]) -> str:
    """Bytes of all agents of all namespaces, and of the store."""
    disk, ram = store["disk"], store["ram"]
    budget = f"/{format_bytes(disk['budget_bytes'])}" if disk["budget_bytes"] else ""
    return (
        f"{format_bytes(store['unique_bytes'])} unique ({format_bytes(store['without_sharing_bytes'])} without sharing) · "
        f"disk {format_bytes(disk['bytes'])}{budget} · RAM {format_bytes(ram['used_bytes'])}"
    )


def _row(agent: dict[str, Any]) -> tuple[str, ...]:
    return (
        agent["agent"],
        agent["model"],
        format_count(agent["tokens"]),
        format_bytes(agent["unique_bytes"]),
        format_bytes(agent["shared_bytes"]),
        agent["state"] + (" pinned" if agent["pinned"] else "") + ("" if agent["persist"] else " ephemeral"),
        format_share(agent["cached_tokens"], agent["prompt_tokens"]),
        format_ms(agent["saved_ms"]),
        format_ago(agent["last_used"]),
        _lineage(agent),
    )


def _lineage(agent: dict[str, Any]) -> str:
    line = agent["lineage"]
    return f"fork of {line['parent']}@t{line['turn']}" if line else "-"


@click.command()
@click.argument("agent")
@json_option
def show(agent: str, as_json: bool) -> None:
    """Show one agent."""
    with AgentMemClient() as client:
        info = client.agent(agent)
    if as_json:
        print_json({"agent": info})
        return
    print_facts(
        [
            ("agent", info["agent"]),
            ("model", info["model"]),
            ("state", info["state"]),
            ("sessions", ", ".join(info["sessions"]) or "none"),
            ("tokens", format_count(info["tokens"])),
            ("turns", format_count(info["turns"])),
            ("on disk", _size(info)),
            ("shared", format_bytes(info["shared_bytes"])),
            ("in RAM", format_bytes(info["ram_bytes"])),
            ("pinned", "yes" if info["pinned"] else "no"),
            ("reuse", info["reuse"]),
            ("planner", info["planner"]),
            ("memory", in_words(info["policy"])),
            ("quota", format_bytes(info["quota_bytes"]) if info["quota_bytes"] else "the daemon's"),
            ("encrypted", _encryption(info)),
            ("lineage", _lineage(info)),
            ("remembered", f"{format_share(info['cached_tokens'], info['prompt_tokens'])} % of the prompts"),
            ("time saved", format_ms(info["saved_ms"])),
            ("last used", format_ago(info["last_used"])),
        ]
    )


def _encryption(info: dict[str, Any]) -> str:
    where = {
        "off": "no",
        "file": "yes, the key is a file of the home",
        "keyring": "yes, the key is in the keychain",
    }
    return where[info["encrypted"]] + ("; LOCKED, the key is not there" if info["locked"] else "")


def _size(info: dict[str, Any]) -> str:
    size = format_bytes(info["disk_bytes"])
    if not info["fp16_bytes"] or not info["disk_bytes"]:
        return size
    ratio = info["disk_bytes"] / info["fp16_bytes"]
    return f"{size} ({ratio:.2f} of the {format_bytes(info['fp16_bytes'])} in fp16)"


@click.command()
@click.argument("agent")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--session", help="Session of the agent. Default: its default session.")
@click.option(
    "--role",
    type=click.Choice(["system", "user"]),
    default="user",
    show_default=True,
    help="Whose message the text becomes.",
)
@click.option(
    "--background", is_flag=True, help="Return at once; it is read while nobody else is there (see jobs)."
)
@json_option
def append(agent: str, file: TextIO, session: str | None, role: str, background: bool, as_json: bool) -> None:
    """Add the text of FILE (- is standard input) to an agent's memory, without a reply."""
    text = read_text(file)
    if background:
        with AgentMemClient() as client:
            job = client.append(agent, text, session=session, role=role, background=True)
        if as_json:
            print_json({"agent": agent, "job": job})
        else:
            click.echo(f"{agent} will read it; {jobs.in_words(job)}")
        return
    with AgentMemClient() as client, console(stderr=True).status(f"{agent} is reading"):
        usage = client.append(agent, text, session=session, role=role)
    if as_json:
        print_json({"agent": agent, "usage": usage})
        return
    memory = usage.get("agentmem") or {}
    kept = "kept on disk" if memory.get("committed") else "not on disk yet"
    click.echo(
        f"{agent}: {format_count(memory.get('prefilled_tokens', 0))} tokens read in "
        f"{format_ms(memory.get('prefill_ms'))}, {kept}"
    )


@click.command()
@click.argument("agent")
@json_option
def warm(agent: str, as_json: bool) -> None:
    """Bring an agent's state from disk into RAM, ahead of its next turn."""
    with AgentMemClient() as client:
        info = client.warm(agent)
    tell_where(info, "in RAM", info["ram_bytes"], as_json)


@click.command()
@click.argument("agent")
@json_option
def evict(agent: str, as_json: bool) -> None:
    """Take an agent's state out of RAM. It stays on disk; nothing is lost."""
    with AgentMemClient() as client:
        info = client.evict(agent)
    tell_where(info, "on disk", info["disk_bytes"], as_json)


def tell_where(info: dict[str, Any], where: str, size: int, as_json: bool) -> None:
    """Print where an agent's state is now."""
    if as_json:
        print_json({"agent": info})
    else:
        click.echo(f"{info['agent']} is {info['state']}: {format_bytes(size)} {where}")


@click.command()
@click.argument("agent")
@click.argument("new")
@click.option("--session", help="Session of the agent. Default: the one used last.")
@click.option("--at", type=click.IntRange(min=1), help="Go on from after this turn. Default: the last.")
@json_option
def fork(agent: str, new: str, session: str | None, at: int | None, as_json: bool) -> None:
    """Make agent NEW, which goes on from AGENT. Nothing is copied; each goes its own way from there."""
    with AgentMemClient() as client:
        info = client.fork(agent, new, session=session, at=at)
    if as_json:
        print_json({"agent": info})
        return
    click.echo(f"{new}: {_lineage(info)}, {format_count(info['tokens'])} tokens, {info['state']}")


@click.command()
@click.argument("agent")
@click.option("--session", help="Forget this session only; the agent stays.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def forget(agent: str, session: str | None, yes: bool, as_json: bool) -> None:
    """Delete what an agent remembers, or one session. This cannot be undone."""
    with AgentMemClient() as client:
        if not yes:
            _confirm(client.agent(agent), session)
        result = client.forget(agent, session=session)
    if as_json:
        print_json(result)
        return
    what = agent if session is None else f"session {session} of {agent}"
    click.echo(f"{what} is forgotten, {format_bytes(result['bytes_freed'])} freed")


def _confirm(info: dict[str, Any], session: str | None) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("forget cannot be undone; without a terminal to ask at, pass --yes")
    what = f"{info['agent']} ({format_count(info['tokens'])} tokens)"
    what = what if session is None else f"session {session} of {info['agent']}"
    click.confirm(f"Forget {what}? This cannot be undone", abort=True, err=True)


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that the daemon serves."""
    with AgentMemClient() as client:
        found = client.models()
    if as_json:
        print_json({"models": found})
        return
    for model in found:
        click.echo(model["id"])

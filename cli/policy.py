"""`create`, `quota`, `pin`, `unpin`: what is asked of an agent."""

from __future__ import annotations

from typing import Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from agentmem.cli.agents import tell_where
from agentmem.cli.memory import KINDS, in_words, policy_from, size_options
from agentmem.cli.output import format_bytes, json_option, print_json
from agentmem.client import AgentMemClient
from agentmem.compose.reuse import DEFAULT, PLANNERS


class Size(click.ParamType):
    """A number of bytes such as 512MiB or 4GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = int(TypeAdapter(ByteSize).validate_python(str(value)))
        except ValidationError:
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size; write for example 512MiB or 4GB", param, ctx)
        return size


reuse_option = click.option(
    "--reuse",
    type=click.Choice(["exact", "composed", "auto", "off"]),
    help="What of remembered state its prompts may use; composed and auto also texts that stood elsewhere. Default: exact.",
)
planner_option = click.option(
    "--planner",
    type=click.Choice(PLANNERS),
    help=f"How its prompts are composed, where they may be. Default: {DEFAULT}.",
)


@click.command()
@click.argument("agent")
@click.option("--quota", type=Size(), help="Bytes of its state on disk at most, for example 512MiB.")
@click.option("--pin", "pinned", is_flag=True, help="Keep its state when room is needed.")
@click.option("--ephemeral", is_flag=True, help="Keep it in RAM only; it never touches the disk.")
@click.option(
    "--encrypt",
    type=click.Choice(["off", "file", "keyring"]),
    help="Where the key of what it leaves on disk is kept. Default: as the daemon is set.",
)
@reuse_option
@planner_option
@click.option("--memory", "kind", type=KINDS, help="How much of its past it keeps at hand. Default: full.")
@size_options
@json_option
def create(
    agent: str,
    quota: int | None,
    pinned: bool,
    ephemeral: bool,
    encrypt: str | None,
    reuse: str | None,
    planner: str | None,
    kind: str | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Make an agent before its first turn, with a policy. Agents without one are made by their first turn."""
    memory = policy_from(kind, **sizes)
    asked: dict[str, Any] = {"pinned": True} if pinned else {}
    asked |= {"quota_bytes": quota} if quota is not None else {}
    asked |= {"persist": False} if ephemeral else {}
    asked |= {"encrypt": encrypt} if encrypt is not None else {}
    asked |= {"reuse": reuse} if reuse is not None else {}
    asked |= {"planner": planner} if planner is not None else {}
    asked |= {"policy": memory} if memory is not None else {}
    with AgentMemClient() as client:
        info = client.create(agent, **asked)
    if as_json:
        print_json({"agent": info})
        return
    words = [
        *(["pinned"] if info["pinned"] else []),
        *([f"at most {format_bytes(info['quota_bytes'])} on disk"] if info["quota_bytes"] else []),
        *([] if info["persist"] else ["in RAM only"]),
        *([f"reuse {info['reuse']}"] if info["reuse"] != "exact" else []),
        *([f"planner {info['planner']}"] if info["planner"] != DEFAULT else []),
        *([f"memory {in_words(info['policy'])}"] if info["policy"]["kind"] != "full" else []),
        *([f"encrypted ({info['encrypted']})"] if info["encrypted"] != "off" else []),
    ]
    click.echo(f"{info['agent']} is made: {', '.join(words) or 'nothing asked of it'}")


@click.command()
@click.argument("agent")
@click.argument("size", type=Size(), required=False)
@click.option("--none", "lift", is_flag=True, help="Take the agent's own quota away.")
@json_option
def quota(agent: str, size: int | None, lift: bool, as_json: bool) -> None:
    """Let an agent's state take at most SIZE on disk. Its sessions that are worth least make room; tokens stay."""
    if lift == (size is not None):
        raise click.UsageError("name a SIZE, or --none")
    with AgentMemClient() as client:
        info = client.set_policy(agent, quota_bytes=size)
    if as_json:
        print_json({"agent": info})
    else:
        limit = format_bytes(size) if size is not None else "no quota of its own"
        click.echo(f"{info['agent']}: {format_bytes(info['disk_bytes'])} on disk, {limit}")


@click.command()
@click.argument("agent")
@json_option
def pin(agent: str, as_json: bool) -> None:
    """Keep an agent's state on disk, and in RAM as long as anything else can go."""
    _set_pin(agent, True, as_json)


@click.command()
@click.argument("agent")
@json_option
def unpin(agent: str, as_json: bool) -> None:
    """Let an agent's state go when room is needed."""
    _set_pin(agent, False, as_json)


def _set_pin(agent: str, pinned: bool, as_json: bool) -> None:
    with AgentMemClient() as client:
        info = client.set_policy(agent, pinned=pinned)
    tell_where(info, "on disk", info["disk_bytes"], as_json)

"""`plugins`: what other distributions add to agentmem."""

from __future__ import annotations

import click

from agentmem.cli.output import json_option, print_json, print_table
from agentmem.plugins import Plugin, add_commands, load_plugins


def add_plugins(cli: click.Group) -> None:
    """Add the commands of plug-ins. A broken one costs a line on stderr, never the command line."""
    found = load_plugins()
    add_commands(found, cli)
    for plugin in found:
        if plugin.error:
            click.echo(f"agentmem: the plug-in {plugin.name} is broken: {plugin.error}", err=True)


@click.command()
@json_option
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the plug-ins: which distribution each comes from, what it adds, and what is wrong with it."""
    found = load_plugins()
    # Asked once more, about the commands that we have without them.
    add_commands(found, click.Group("agentmem", commands=_ours(ctx)))
    if as_json:
        print_json({"plugins": [_fields(plugin) for plugin in found]})
    elif not found:
        click.echo("no plug-ins; a distribution brings one with an entry point in the group agentmem")
    else:
        columns = ("PLUGIN", "DISTRIBUTION", "VERSION", "COMMANDS", "ADAPTERS", "ERROR")
        print_table(columns, [_row(plugin) for plugin in found])


def _ours(ctx: click.Context) -> dict[str, click.Command]:
    root = ctx.find_root().command
    commands = root.commands if isinstance(root, click.Group) else {}
    return {
        n: c for n, c in commands.items() if (c.callback or plugins).__module__.startswith("agentmem.cli.")
    }


def _fields(plugin: Plugin) -> dict[str, object]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "commands": plugin.commands,
        "adapters": [adapter._asdict() for adapter in plugin.adapters],
        "error": plugin.error,
    }


def _row(plugin: Plugin) -> tuple[str, ...]:
    adapters = ", ".join(adapter.name for adapter in plugin.adapters)
    return (
        plugin.name,
        plugin.distribution,
        plugin.version,
        ", ".join(plugin.commands) or "-",
        adapters or "-",
        plugin.error or "-",
    )

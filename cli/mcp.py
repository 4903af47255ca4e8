"""`mcp`: the control verbs as a tool server for other agents, on standard input and output."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from agentmem.cli.output import json_option, print_json


@click.command()
@click.option("--namespace", default="default", show_default=True, help="Namespace of the agents.")
@click.option("--allow-forget", is_flag=True, help="Offer forget, too, which cannot be undone.")
@json_option
def mcp(namespace: str, allow_forget: bool, as_json: bool) -> None:
    """Serve the control verbs over the Model Context Protocol (stdio), for the daemon of this home.

    With --json the tools are printed instead. Needs the extra mcp: pip install 'agentmem-mlx[mcp]'.
    """
    server = _server(namespace, allow_forget)
    if as_json:
        tools = asyncio.run(server.list_tools())
        print_json({"tools": [tool.model_dump(mode="json", exclude_none=True) for tool in tools]})
    else:
        server.run("stdio")


def _server(namespace: str, allow_forget: bool) -> Any:
    try:
        from agentmem.adapters.mcp_server import mcp_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mcp":
            raise
        raise click.ClickException(
            "the package mcp is not installed; get it with: pip install 'agentmem-mlx[mcp]'"
        ) from error
    return mcp_server(namespace=namespace, allow_forget=allow_forget)

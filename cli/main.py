"""`agentmem`: the command group, and how every failure becomes one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

import agentmem
from agentmem.cli import (
    agents,
    bench,
    completion,
    config,
    demo,
    doctor,
    documents,
    explain,
    files,
    jobs,
    launch,
    lifecycle,
    mcp,
    memory,
    plugins,
    policy,
    room,
    service,
    store,
    talk,
    token,
    top,
    transfer,
)
from agentmem.cli.exits import Exit, exit_code
from agentmem.cli.output import print_json
from agentmem.errors import AgentMemError


class Commands(click.Group):
    """A group that lists its commands in the order of a person's first day, and reports errors our way."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run one command line and exit. An error is a line on stderr, with `--json` also an object."""
        line = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        sys.exit(_outcome(lambda: super(Commands, self).main(line, *rest, **extra), "--json" in line))


def _outcome(command: Any, as_json: bool) -> int:
    try:
        result = command()
    except AgentMemError as error:
        return _report(error.message, exit_code(error), error.type, error.code, error.param, as_json)
    except click.UsageError as error:
        if error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        return _report(error.format_message(), Exit.USAGE, "usage_error", None, None, as_json)
    except click.ClickException as error:
        return _report(error.format_message(), Exit.FAILURE, "failure", None, None, as_json)
    except (click.Abort, KeyboardInterrupt):
        return _report("interrupted", Exit.INTERRUPTED, "interrupted", None, None, as_json)
    return int(result) if isinstance(result, int) else Exit.OK


def _report(message: str, code: Exit, kind: str, name: str | None, param: str | None, as_json: bool) -> Exit:
    click.echo(f"agentmem: {' '.join(message.split())}", err=True)
    if as_json:
        error = {"message": message, "type": kind, "code": name, "param": param, "exit_code": int(code)}
        print_json({"error": error})
    return code


def _use_home(_ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    # The environment reaches the daemon that a command starts, and everything that asks for the default home.
    if value is not None:
        os.environ["AGENTMEM_HOME"] = str(value.expanduser().absolute())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(agentmem.__version__, prog_name="agentmem")
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    expose_value=False,
    callback=_use_home,
    help="Home folder of the daemon. Default: $AGENTMEM_HOME, else the platform's data folder.",
)
def cli() -> None:
    """Keep the memory of LLM agents below the prompt: 4-bit attention state that survives a restart.

    Data goes to stdout, messages go to stderr, and every command takes --json.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 daemon not running, 4 not found, 5 refused, 6 integrity problem,
    7 warnings of doctor, 130 interrupted.
    """


for command in (
    demo.demo,
    lifecycle.up,
    lifecycle.down,
    lifecycle.status,
    lifecycle.serve,
    talk.run,
    talk.chat,
    agents.agents,
    top.top,
    agents.show,
    explain.explain,
    memory.episodes,
    policy.create,
    agents.fork,
    agents.append,
    jobs.jobs,
    agents.warm,
    agents.evict,
    documents.doc,
    policy.pin,
    policy.unpin,
    policy.quota,
    memory.memory,
    agents.forget,
    room.df,
    room.prune,
    store.verify,
    store.repair,
    transfer.export_agent,
    transfer.import_agent,
    agents.models,
    doctor.doctor,
    config.config,
    service.service,
    completion.completion,
    bench.bench,
    launch.launch,
    mcp.mcp,
    plugins.plugins,
    token.token,
    files.logs,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point of the `agentmem` script."""
    # As an exception, SIGTERM reaches the `finally` that stops the daemons of a demo.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    plugins.add_plugins(cli)
    cli.main(prog_name="agentmem")

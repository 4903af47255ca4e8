"""`launch`: a coding tool on this daemon, with a profile of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

import click

from agentmem.cli.lifecycle import ensure_daemon
from agentmem.cli.output import json_option, print_json
from agentmem.cli.profile import TOOLS, Profile, profile_of
from agentmem.daemon import running_daemon
from agentmem.errors import NotFound
from agentmem.home import Home, default_home
from agentmem.settings import Settings
from agentmem.tokens import read_token, token_path

TOKEN = "$(agentmem token show --inference)"


@click.command()
@click.argument("tool", type=click.Choice(sorted(TOOLS)))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--print", "show", is_flag=True, help="Print the profile and the command; write and run nothing."
)
@json_option
def launch(tool: str, args: tuple[str, ...], show: bool, as_json: bool) -> None:
    """Run a coding tool on the daemon, which is started if need be: agentmem launch codex -- exec "Say hi".

    The tool gets the inference token and a private profile in the home's folder launch; your own configuration of
    it stays as it is. With --json the profile is printed, as with --print.
    """
    home = Home(default_home())
    command = [tool, *args]
    if show or as_json:
        _show(_planned(tool, home), command, as_json)
        return
    path = shutil.which(tool)
    if path is None:
        raise NotFound(f"{tool} is not installed: there is no program of that name on the PATH")
    record, _ = ensure_daemon(home, {})
    profile = profile_of(tool, home, record.url, record.model)
    profile.write()
    environment = profile.applied(os.environ, read_token(token_path(home, "inference")))
    sys.stdout.flush()
    os.execve(path, command, environment)


def _planned(tool: str, home: Home) -> Profile:
    """The profile for the daemon that runs, or for the one that would be started."""
    record = running_daemon(home)
    if record is not None:
        return profile_of(tool, home, record.url, record.model)
    settings = Settings(home=home.root)
    return profile_of(tool, home, f"http://{settings.host}:{settings.port}", settings.model)


def _show(profile: Profile, command: list[str], as_json: bool) -> None:
    environment = {**profile.environment, profile.secret: TOKEN}
    if as_json:
        print_json(
            {
                "folder": str(profile.folder),
                "files": profile.files,
                "environment": environment,
                "unset": list(profile.without),
                "command": command,
            }
        )
        return
    for name, text in profile.files.items():
        click.echo(f"# {profile.folder / name}\n" + "".join(f"#   {line}\n" for line in text.splitlines()))
    for name in profile.without:
        click.echo(f"unset {name}")
    for name, value in environment.items():
        quoted = f'"{TOKEN}"' if value == TOKEN else shlex.quote(value)
        click.echo(f"export {name}={quoted}")
    click.echo(shlex.join(command))

"""`config`: the settings that a daemon of this home would start with, and where each comes from."""

from __future__ import annotations

import os
import tomllib
from typing import Any

import click
from pydantic import ValidationError

from agentmem.cli.output import json_option, print_json, print_table
from agentmem.errors import BadRequest
from agentmem.home import Home, default_home
from agentmem.settings import Settings

PREFIX = "AGENTMEM_"


@click.group()
def config() -> None:
    """The daemon's settings: flags, then AGENTMEM_* in the environment, then config.toml in the home, then defaults."""


@config.command("show")
@json_option
def config_show(as_json: bool) -> None:
    """Print every setting and where it comes from."""
    path = Home(default_home()).config
    try:
        settings = Settings()
        written = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"the settings cannot be used: {' '.join(str(error).split())}") from error
    found = {
        name: {"value": _plain(value), "origin": _origin(name, written)}
        for name, value in settings.model_dump().items()
    }
    if as_json:
        print_json({"path": str(path), "settings": found})
    else:
        rows = [(name, str(one["value"]), one["origin"]) for name, one in found.items()]
        print_table(("SETTING", "VALUE", "FROM"), rows)


@config.command("path")
@json_option
def config_path(as_json: bool) -> None:
    """Print where the settings file lies, whether or not there is one."""
    path = Home(default_home()).config
    if as_json:
        print_json({"path": str(path), "exists": path.exists()})
    else:
        click.echo(path)


def _origin(name: str, written: dict[str, Any]) -> str:
    if PREFIX + name.upper() in os.environ:
        return "environment"
    return "config.toml" if name in written else "default"


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list) else str(value)

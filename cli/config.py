"""`config`: the settings that a daemon of this home would start with, where each comes from, and the file that holds them."""

from __future__ import annotations

import os
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import click
import tomlkit
from pydantic import ValidationError
from tomlkit.exceptions import TOMLKitError

from agentmem.cli.output import json_option, print_json, print_table
from agentmem.errors import BadRequest
from agentmem.home import Home, default_home, publish
from agentmem.settings import Settings

PREFIX = "AGENTMEM_"


@click.group()
def config() -> None:
    """The daemon's settings: flags, then AGENTMEM_* in the environment, then config.toml in the home, then defaults."""


@config.command("show")
@json_option
def config_show(as_json: bool) -> None:
    """Print every setting and where it comes from."""
    path, written = Home(default_home()).config, _written()
    try:
        settings = Settings()
    except ValidationError as error:
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


@config.command("set")
@click.argument("name")
@click.argument("value")
@json_option
def config_set(name: str, value: str, as_json: bool) -> None:
    """Write a setting into the file; it holds from the daemon's next start on.

    VALUE is as in the file, without quotes: 8, true, 64MiB, '["one.example"]'.
    """
    document = _written()
    document[name] = _value(_known(name), value)
    publish(Home(default_home()).config, tomlkit.dumps(document).encode())
    _report(name, as_json)


@config.command("unset")
@click.argument("name")
@json_option
def config_unset(name: str, as_json: bool) -> None:
    """Take a setting out of the file, so that its default holds again; nothing happens where it is not there."""
    document = _written()
    if _known(name) in document:
        del document[name]
        publish(Home(default_home()).config, tomlkit.dumps(document).encode())
    _report(name, as_json)


def _written() -> tomlkit.TOMLDocument:
    """The settings file, with its comments. Raises BadRequest."""
    path = Home(default_home()).config
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not TOML: {error}; mend it, or put it away") from error


def _known(name: str) -> str:
    """Raises BadRequest for what is no setting, or cannot be in the file."""
    if name == "home":
        raise BadRequest("the home is where the file lies; set AGENTMEM_HOME, or name it with --home")
    if name not in Settings.model_fields:
        near = get_close_matches(name, Settings.model_fields, n=1)
        meant = f"did you mean {near[0]}?" if near else "see `agentmem config show`"
        raise BadRequest(f"there is no setting {name!r}; {meant}")
    return name


def _value(name: str, text: str) -> Any:
    """The value as TOML holds it: what the text is in TOML where the setting takes it, else the text itself."""
    said: list[Any] = [text]
    with suppress(TOMLKitError):
        said.insert(0, tomlkit.value(text).unwrap())
    for value in said:
        try:
            Settings.__pydantic_validator__.validate_assignment(Settings.model_construct(), name, value)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"]
        else:
            return value
    raise BadRequest(f"{name} cannot be {text!r}: {wrong}")


def _report(name: str, as_json: bool) -> None:
    """What holds now."""
    value, origin = _plain(getattr(Settings(), name)), _origin(name, _written())
    if as_json:
        print_json({"setting": name, "value": value, "origin": origin})
        return
    click.echo(f"{name} is {value} ({origin}), from the daemon's next start on")


def _origin(name: str, written: dict[str, Any]) -> str:
    if PREFIX + name.upper() in os.environ:
        return "environment"
    return "config.toml" if name in written else "default"


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list) else str(value)

"""`service`: the daemon as a service of the person who is logged in, under launchd or systemd."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click

from agentmem.cli.output import json_option, print_json
from agentmem.errors import Forbidden, NotFound
from agentmem.home import Home, default_home

LABEL = "org.agentmem.daemon"


class Service(NamedTuple):
    """A service manager's file, and the commands that start, stop and ask about it."""

    path: Path
    text: bytes
    start: tuple[tuple[str, ...], ...]
    stop: tuple[tuple[str, ...], ...]
    ask: tuple[str, ...]


def _command() -> list[str]:
    return [sys.executable, "-m", "agentmem.server", "--home", str(default_home())]


def _launchd() -> Service:
    log = str(Home(default_home()).log)
    path = Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    domain = f"gui/{os.getuid()}"
    text = plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": _command(),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "StandardOutPath": log,
            "StandardErrorPath": log,
            "ProcessType": "Interactive",
            "Umask": 0o077,
        }
    )
    start = (("launchctl", "bootstrap", domain, str(path)),)
    return Service(
        path,
        text,
        start,
        (("launchctl", "bootout", f"{domain}/{LABEL}"),),
        ("launchctl", "print", f"{domain}/{LABEL}"),
    )


def _systemd() -> Service:
    configured = os.environ.get("XDG_CONFIG_HOME")
    folder = (Path(configured) if configured else Path.home() / ".config") / "systemd" / "user"
    command = " ".join(f'"{part}"' for part in _command())
    text = (
        "[Unit]\nDescription=agentmem: the memory of AI agents\n\n[Service]\n"
        f"ExecStart={command}\nRestart=on-failure\nUMask=0077\n\n[Install]\nWantedBy=default.target\n"
    )
    user = ("systemctl", "--user")
    return Service(
        folder / "agentmem.service",
        text.encode(),
        ((*user, "daemon-reload"), (*user, "enable", "--now", "agentmem.service")),
        ((*user, "disable", "--now", "agentmem.service"),),
        (*user, "is-active", "agentmem.service"),
    )


def _of_this_system() -> Service:
    return _launchd() if sys.platform == "darwin" else _systemd()


@click.group()
def service() -> None:
    """Run the daemon whenever you are logged in."""


@service.command("print")
@json_option
def service_print(as_json: bool) -> None:
    """Print the service manager's file without writing it."""
    found = _of_this_system()
    if as_json:
        print_json({"path": str(found.path), "text": found.text.decode()})
    else:
        click.echo(found.text.decode(), nl=False)


@service.command("install")
@click.option("--no-start", is_flag=True, help="Write the file, and start nothing.")
@json_option
def service_install(no_start: bool, as_json: bool) -> None:
    """Write the service manager's file, and start the daemon by it."""
    found = _of_this_system()
    Home(default_home()).prepare()
    found.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = found.path.with_suffix(".tmp")
    temporary.write_bytes(found.text)
    temporary.chmod(0o600)
    temporary.replace(found.path)
    for command in () if no_start else found.start:
        _run(command)
    _tell(found, as_json, "written" if no_start else "started")


@service.command("uninstall")
@json_option
def service_uninstall(as_json: bool) -> None:
    """Stop the daemon as a service, and take the file away. What agents remember stays."""
    found = _of_this_system()
    if not found.path.exists():
        raise NotFound(f"there is no service at {found.path}")
    for command in found.stop:
        _run(command)
    found.path.unlink()
    _tell(found, as_json, "removed")


@service.command("status")
@json_option
def service_status(as_json: bool) -> None:
    """Say whether the service is installed, and whether it runs."""
    found = _of_this_system()
    state = "not installed"
    if found.path.exists():
        state = "running" if shutil.which(found.ask[0]) and _quiet(found.ask) == 0 else "stopped"
    _tell(found, as_json, state)


def _tell(found: Service, as_json: bool, state: str) -> None:
    if as_json:
        print_json({"path": str(found.path), "state": state})
    else:
        click.echo(f"{found.path}: {state}")


def _quiet(command: tuple[str, ...]) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode


def _run(command: tuple[str, ...]) -> None:
    """Raises NotFound where there is no such service manager, Forbidden where it refuses."""
    if shutil.which(command[0]) is None:
        raise NotFound(f"{command[0]} is not here; start the daemon with: agentmem up")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Forbidden(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[:300]}")

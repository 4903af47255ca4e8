"""`up`, `down`, `status`, `serve`: the daemon as a person starts and stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import click
import psutil

from agentmem.cli.daemon import (
    STOP_TIMEOUT_S,
    Progress,
    Ready,
    StartFailed,
    StopFailed,
    read_line,
    server_command,
    start_daemon,
)
from agentmem.cli.exits import Exit
from agentmem.cli.output import format_ms, json_option, print_facts, print_json, say
from agentmem.cli.progress import Steps
from agentmem.cli.settings_options import settings_options
from agentmem.client import AgentMemClient
from agentmem.daemon import DaemonRecord, running_daemon
from agentmem.errors import AlreadyRunning
from agentmem.home import Home, default_home

RACE_TIMEOUT_S = 60.0
RACE_PAUSE_S = 2.0
POLL_S = 0.05


@click.command()
@settings_options
@json_option
def up(as_json: bool, **settings: Any) -> None:
    """Start the daemon in the background, or say where it already runs.

    Waits until the daemon is ready to serve. Its log is logs/daemon.log in the home folder. Options that are
    not given come from AGENTMEM_* variables, then from config.toml in the home folder.
    """
    home = Home(default_home())
    record = running_daemon(home)
    status = "running"
    if record is None:
        record, status = ensure_daemon(home, settings)
    elif any(value is not None for value in settings.values()):
        say("it was running before: the options of this call do not apply to it; run agentmem down first")
    if as_json:
        print_json({"status": status, **_facts(record)})
        return
    verb = "started" if status == "started" else "runs already"
    click.echo(f"agentmem {verb}: {record.url} (pid {record.pid}, model {record.model})")


def ensure_daemon(home: Home, settings: dict[str, Any]) -> tuple[DaemonRecord, str]:
    """The daemon that holds `home` in the end: ours ("started"), or that of another call ("running")."""
    if (record := running_daemon(home)) is not None:
        return record, "running"
    deadline = time.monotonic() + RACE_TIMEOUT_S
    with Steps() as steps:
        steps.step("starting the daemon")
        while True:
            try:
                start_daemon(home, settings, on_progress=steps.daemon)
            except AlreadyRunning:
                # Its holder may be about to serve, or about to be gone: look again, then try again.
                if (record := _look_for(home, RACE_PAUSE_S)) is not None:
                    return record, "running"
                if time.monotonic() > deadline:
                    raise
            else:
                return _started(home), "started"


def _started(home: Home) -> DaemonRecord:
    record = _look_for(home, RACE_PAUSE_S)
    if record is None:
        raise StartFailed(f"the daemon became ready and is gone again; its log is {home.log}")
    return record


def _look_for(home: Home, seconds: float) -> DaemonRecord | None:
    """The record of a running daemon, as soon as there is one."""
    deadline = time.monotonic() + seconds
    while (record := running_daemon(home)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return record


def _facts(record: DaemonRecord) -> dict[str, Any]:
    facts = asdict(record)
    return {name: facts[name] for name in ("pid", "url", "port", "model", "version", "home", "started")}


@click.command()
@click.option(
    "--timeout", type=click.FloatRange(0), default=STOP_TIMEOUT_S, show_default=True, help="Seconds."
)
@json_option
def down(timeout: float, as_json: bool) -> None:
    """Stop the daemon and wait until it is gone. Not an error when none runs."""
    home = Home(default_home())
    record = running_daemon(home)
    if record is not None:
        _stop(record, timeout)
    if as_json:
        print_json({"status": "stopped", "pid": record.pid if record else None, "home": str(home.root)})
    else:
        click.echo(f"agentmem stopped (pid {record.pid})" if record else "agentmem was not running")


def _stop(record: DaemonRecord, timeout: float) -> None:
    """End the daemon. A zombie is over too: in a container nobody may collect it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(record.pid).terminate()
    deadline = time.monotonic() + timeout
    while record.alive:
        if time.monotonic() > deadline:
            raise StopFailed(
                f"the daemon (pid {record.pid}) is still busy after {timeout:.0f} s; "
                f"`kill -9 {record.pid}` is safe: every acknowledged turn is on disk"
            )
        time.sleep(POLL_S)


@click.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Say whether the daemon runs, where, and how it is. Exit code 3 when it does not run."""
    home = Home(default_home())
    record = running_daemon(home)
    if record is None:
        if as_json:
            print_json({"status": "stopped", "home": str(home.root)})
        else:
            click.echo(f"agentmem is not running for {home.root}; start it with: agentmem up")
        ctx.exit(Exit.NOT_RUNNING)
    with AgentMemClient() as client:
        health = client.health()
    uptime_s = round(time.time() - record.started, 1)
    if as_json:
        print_json({"status": "running", **_facts(record), "uptime_s": uptime_s, "health": health})
        return
    print_facts(
        [
            ("status", str(health.get("status", "running"))),
            ("address", record.url),
            ("model", record.model),
            ("pid", str(record.pid)),
            ("up for", format_ms(1000 * uptime_s)),
            ("version", record.version),
            ("home", record.home),
        ]
    )


@click.command()
@settings_options
@json_option
def serve(as_json: bool, **settings: Any) -> None:
    """Run the daemon in the foreground, for a terminal or a service manager.

    With --json every line of the daemon's standard output becomes one JSON object: its progress, and the
    address once it is ready.
    """
    command = server_command(settings)
    if not as_json:
        os.execv(command[0], command)
    sys.exit(_serve_json(command))


def _serve_json(command: list[str]) -> int:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        # A Ctrl-C reaches the daemon too, and the daemon decides when it is over.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert process.stdout is not None
        for line in process.stdout:
            print_json(_event(line.strip(), process.pid), compact=True)
    return process.returncode


def _event(line: str, pid: int) -> dict[str, Any]:
    match read_line(line):
        case Ready(url):
            return {"event": "ready", "url": url, "pid": pid}
        case Progress(fraction, text):
            return {"event": "progress", "fraction": fraction, "text": text}
    return {"event": "output", "text": line}

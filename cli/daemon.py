"""The life of a daemon process: start it and follow its progress, stop it, kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from agentmem.errors import AgentMemError, AlreadyRunning, BadRequest, Forbidden
from agentmem.home import Home, private

START_TIMEOUT_S = 1800.0  # a first start may fetch and convert a model
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
LOG_LIMIT = 16 << 20
USAGE_CODE, REFUSED_CODE = 2, 5  # of the daemon process


class Ready(NamedTuple):
    """The daemon serves at `url`."""

    url: str


class Progress(NamedTuple):
    """The daemon is busy before it serves: a fraction 0..1, and what it does."""

    fraction: float
    text: str


def read_line(line: str) -> Ready | Progress | None:
    """What a line of the daemon's standard output announces; None for any other line."""
    match line.strip().split(" ", 3):
        case ["agentmem", "ready", url]:
            return Ready(url)
        case ["agentmem", "progress", fraction, text]:
            return Progress(float(fraction), text)
    return None


OnProgress = Callable[[float, str], None]
"""Called with a fraction 0..1 and what the daemon is doing."""


class StartFailed(AgentMemError):
    """The daemon did not become ready."""

    type = "start_error"
    code = "daemon_start_failed"


class StopFailed(AgentMemError):
    """The daemon did not stop in time."""

    type = "stop_error"
    code = "daemon_stop_failed"


@dataclass(slots=True)
class Daemon:
    """A daemon that this process started. It outlives this process unless it is stopped."""

    process: subprocess.Popen[bytes]
    home: Home
    url: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end cleanly and wait. Raises StopFailed after `timeout` seconds."""
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired as cause:
            raise StopFailed(f"the daemon (pid {self.pid}) did not end within {timeout:.0f} s") from cause

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


def server_command(settings: Mapping[str, object]) -> list[str]:
    """The command line of the daemon. `settings` are fields of Settings; None leaves one at its default."""
    command = [sys.executable, "-m", "agentmem.server"]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command.append(flag)
        elif value is not None and value is not False:
            command += [flag, str(value)]
    return command


def start_daemon(
    home: Home,
    settings: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
    timeout: float = START_TIMEOUT_S,
) -> Daemon:
    """Start a daemon on `home`, detached, and wait until it is ready to serve.

    `environment` replaces the environment of this process. Raises AlreadyRunning when another daemon holds
    the home, BadRequest and Forbidden for settings that are wrong or refused, StartFailed when it ends for
    another reason or is silent for `timeout` seconds. After an error no process is left behind.
    """
    home.prepare()
    _rotate(home.log)
    base = dict(os.environ if environment is None else environment)
    with _log(home) as log:
        offset = log.tell()
        process = subprocess.Popen(
            server_command({"home": home.root, **(settings or {})}),
            env={**base, "AGENTMEM_HOME": str(home.root), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return Daemon(process, home, _await_ready(process, home, offset, on_progress, timeout))
    except BaseException:
        process.kill()
        process.wait()
        raise


def _await_ready(
    process: subprocess.Popen[bytes], home: Home, offset: int, on_progress: OnProgress | None, timeout: float
) -> str:
    heard = time.monotonic()
    last_words = ""
    with open(home.log, encoding="utf-8", errors="replace", opener=private) as lines:
        lines.seek(offset)
        partial = ""
        while True:
            ended = process.poll() is not None
            while piece := lines.readline():
                heard = time.monotonic()
                partial += piece
                if not partial.endswith("\n"):
                    continue
                line, partial = partial.strip(), ""
                match read_line(line):
                    case Ready(url):
                        return url
                    case Progress() as progress if on_progress is not None:
                        on_progress(*progress)
                last_words = line or last_words
            if ended:
                raise _start_error(process.returncode, last_words, home)
            if time.monotonic() - heard > timeout:
                raise StartFailed(f"the daemon said nothing for {timeout:.0f} s; its log is {home.log}")
            time.sleep(POLL_S)


def _start_error(code: int, last_words: str, home: Home) -> AgentMemError:
    reason = last_words.removeprefix("agentmem: ") or f"it ended with code {code}"
    if code == REFUSED_CODE:
        return AlreadyRunning(reason) if _is_held(home) else Forbidden(reason)
    if code == USAGE_CODE:
        return BadRequest(reason)
    return StartFailed(f"the daemon did not start: {reason} (log: {home.log})")


def _is_held(home: Home) -> bool:
    try:
        with FileLock(home.lock, timeout=0, mode=0o600):
            return False
    except Timeout:
        return True


def _log(home: Home) -> BinaryIO:
    try:
        return open(home.log, "ab", opener=private)
    except OSError as error:
        raise Forbidden(f"cannot write {home.log}: {error.strerror}; is it a plain file of yours?") from error


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_name(log.name + ".1"))

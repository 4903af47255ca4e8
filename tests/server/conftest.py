"""Real daemons as processes of their own: on the tiny model, and on the embedded one where text must make sense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import platformdirs
import pytest

READY = "agentmem ready "


@dataclass
class Daemon:
    """A served home. `http` sends the token, `bare` does not."""

    home: Path
    process: subprocess.Popen[str]
    url: str
    token: str
    log: Path
    http: httpx.Client = field(init=False)
    bare: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)
        self.bare = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client on this daemon."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0, **options)

    def chat(self, agent: str, *texts: str, **fields: Any) -> dict[str, Any]:
        """One reply to a conversation that begins with the user and alternates."""
        messages = [
            {"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)
        ]
        body = {"messages": messages, "max_tokens": 4, "agentmem": {"agent": agent}, **fields}
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        """One sample of /metrics."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise KeyError(name)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.http.close()
        self.bare.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Nothing of the person's own settings; converted models are kept between test runs."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AGENTMEM_")}
    cache = Path(platformdirs.user_cache_dir("agentmem-tests", False)) / "models"
    return {**plain, "AGENTMEM_MODELS": os.environ.get("AGENTMEM_MODELS", str(cache))}


Launch = Callable[..., "subprocess.Popen[str]"]
Start = Callable[..., Daemon]


@pytest.fixture(scope="session")
def launch(environment: dict[str, str], tiny_model: Path) -> Launch:
    """Run `python -m agentmem.server` with flags, without waiting for anything."""

    def run(
        home: Path, *flags: str, model: str = str(tiny_model), log: Path | None = None
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "agentmem.server", "--home", str(home), "--port", "0"]
        stderr = log.open("w") if log else subprocess.PIPE
        return subprocess.Popen(
            [*command, "--model", model, "--ram-budget", "64MiB", *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def start(launch: Launch) -> Iterator[Start]:
    """Start a daemon on a home and wait until it says that it is ready."""
    started: list[Daemon] = []

    def run(home: Path, *flags: str, **options: Any) -> Daemon:
        log = home.with_name(f"{home.name}.log")
        process = launch(home, *flags, log=log, **options)
        assert process.stdout is not None
        ready = next((line for line in process.stdout if line.startswith(READY)), "")
        assert ready, f"ended with {process.wait()} before it was ready\n{log.read_text()}"
        token = (home / "token").read_text().strip()
        daemon = Daemon(home, process, ready.removeprefix(READY).strip(), token, log)
        started.append(daemon)
        return daemon

    yield run
    for daemon in started:
        daemon.stop()


@pytest.fixture(scope="session")
def tiny_daemon(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """The daemon that most tests share."""
    return start(tmp_path_factory.mktemp("server") / "home")


@pytest.fixture(scope="session")
def daemon(tiny_daemon: Daemon) -> Daemon:
    """A daemon like any other. A module may put its own in its place."""
    return tiny_daemon


@pytest.fixture(scope="module")
def embedded_daemon(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One on the embedded model, with default settings; it takes memory, so it ends with the module."""
    home = tmp_path_factory.mktemp("embedded") / "home"
    daemon = start(home, "--ram-budget", "1GiB", model="embedded")
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def record(daemon: Daemon) -> dict[str, Any]:
    """What the daemon wrote about itself."""
    return json.loads((daemon.home / "daemon.json").read_text())

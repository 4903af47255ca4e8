"""The real daemon on a tiny model, as a process that may be killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

READY = "agentmem ready "


def log_of(home: Path) -> Path:
    return home.with_name(f"{home.name}.log")


def spawn(home: Path, model: Path, *flags: str, failpoint: str = "") -> subprocess.Popen[str]:
    """The process, without waiting for anything; it dies at `failpoint`, "name:n"."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AGENTMEM_")}
    plain["AGENTMEM_FAILPOINT"] = failpoint
    command = [
        sys.executable,
        "-m",
        "agentmem.server",
        "--home",
        str(home),
        "--port",
        "0",
        "--model",
        str(model),
    ]
    with log_of(home).open("a") as errors:
        return subprocess.Popen(
            [*command, *flags], env=plain, stdout=subprocess.PIPE, stderr=errors, text=True
        )


class Daemon:
    """One start of the daemon on `home`. Fails when it does not come up."""

    def __init__(self, home: Path, model: Path, *flags: str, failpoint: str = "") -> None:
        self.process = spawn(home, model, *flags, failpoint=failpoint)
        self.log = log_of(home)
        assert self.process.stdout is not None
        ready = next((line for line in self.process.stdout if line.startswith(READY)), "")
        assert ready, f"the daemon did not start: {self.log.read_text()[-3000:]}"
        token = (home / "token").read_text().strip()
        self.http = httpx.Client(
            base_url=ready.removeprefix(READY).strip(),
            headers={"authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
        )

    def chat(self, agent: str, text: str, **fields: Any) -> dict[str, Any]:
        """One turn of a conversation that the daemon keeps; returns its usage. Raises httpx.HTTPError."""
        return self.say(agent, text, **fields)[1]

    def say(self, agent: str, text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        """The same; returns the reply too."""
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 6,
            "agentmem": {"agent": agent, "history": "server"},
            **fields,
        }
        answer = self.post("/v1/chat/completions", body)
        return str(answer["choices"][0]["message"]["content"]), dict(answer["usage"])

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises httpx.HTTPError."""
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def get(self, path: str) -> dict[str, Any]:
        response = self.http.get(path)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def kill(self) -> None:
        """SIGKILL, now."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

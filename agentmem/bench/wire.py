"""What HTTP adds to the time to first token: a daemon of its own, and one client that speaks to it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from agentmem.bench.checks import check

READY = "agentmem ready "
MOST_MS = 10.0
STORY = "The keeper of the lighthouse writes down every ship that passes the cape, its name and its flag. "


@contextmanager
def _daemon(model: str, folder: Path) -> Iterator[httpx.Client]:
    """A running daemon, and a client with its token."""
    home = folder / "home"
    command = [sys.executable, "-m", "agentmem.server", "--home", str(home), "--port", "0", "--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    try:
        assert process.stdout is not None
        url = next(
            (line.removeprefix(READY).strip() for line in process.stdout if line.startswith(READY)), None
        )
        if url is None:
            raise RuntimeError("the daemon did not start")
        token = (home / "token").read_text().strip()
        with httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=600, trust_env=False
        ) as client:
            yield client
    finally:
        process.terminate()
        process.wait(60)


def _turn(client: httpx.Client, messages: list[dict[str, str]]) -> tuple[float, float, str]:
    """One streamed turn: ms to the first text for the client, and for the engine; and the reply."""
    body = {
        "messages": messages, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "agentmem": {"agent": "bench"},
    }  # fmt: skip
    first, text = 0.0, ""
    usage: dict[str, Any] = {}
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            said = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if said and not text:
                first = 1e3 * (time.perf_counter() - start)
            text += said
            usage = chunk.get("usage") or usage
    return first, usage["agentmem"]["ttft_ms"], text


def run(model: str, turns: int, words: int, say: Callable[[str], None]) -> dict[str, Any]:
    """`turns` hot turns behind about `words` words of history. Times in ms; both of a turn begin with its request."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="agentmem-bench-") as folder,
        _daemon(model, Path(folder)) as client,
    ):
        say("the daemon is up")
        messages = [{"role": "user", "content": STORY * (1 + words // len(STORY.split()))}]
        for number in range(turns + 1):
            seen, engine, text = _turn(client, messages)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"And ship {number}?"},
            ]
            if number and text:  # the first one is cold
                rows.append({"client_ms": seen, "engine_ms": engine, "http_ms": seen - engine})
    found = [row["http_ms"] for row in rows]
    median = statistics.median(found)
    return {
        "schema_version": 1,
        "model": model,
        "rows": rows,
        "engine_ms": statistics.median(row["engine_ms"] for row in rows),
        "http_ms": median,
        "http_p95_ms": statistics.quantiles(found, n=20)[-1] if len(found) > 1 else median,
        "checks": [check("TTFT through HTTP less the engine's", median, MOST_MS, "ms", at_most=True)],
    }

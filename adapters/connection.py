"""OpenAI's client on the daemon, for frameworks that take one."""

from __future__ import annotations

from pathlib import Path

import httpx
from openai import AsyncOpenAI

from agentmem.daemon import find_endpoint
from agentmem.wire import CONNECT_TIMEOUT_S, READ_TIMEOUT_S


def openai_client(
    url: str | None = None, token: str | None = None, home: str | Path | None = None
) -> AsyncOpenAI:
    """A client of the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning."""
    endpoint = find_endpoint(url, token, home)
    http = httpx.AsyncClient(
        # A proxy that the environment names must never see the token.
        trust_env=False,
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # No connection is kept: it would belong to one event loop, and the next run may bring another.
        limits=httpx.Limits(max_keepalive_connections=0),
    )
    return AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.token or "none", http_client=http)

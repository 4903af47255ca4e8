"""OpenAI's client on the daemon, for frameworks that take one."""

from __future__ import annotations

from pathlib import Path

from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient

from agentmem.daemon import find_endpoint

# No connection is kept: it would belong to one event loop, and the next run may bring another.
NONE_KEPT = type(DEFAULT_CONNECTION_LIMITS)(max_keepalive_connections=0)


def openai_client(
    url: str | None = None, token: str | None = None, home: str | Path | None = None
) -> AsyncOpenAI:
    """A client of the daemon at `url`, by default the one that holds `home`. Raises DaemonNotRunning."""
    endpoint = find_endpoint(url, token, home)
    # A proxy that the environment names must never see the token.
    http = DefaultAsyncHttpxClient(trust_env=False, limits=NONE_KEPT)
    return AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.token or "none", http_client=http)

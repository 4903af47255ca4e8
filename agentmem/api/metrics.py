"""Numbers for Prometheus. Token counts follow the names that inference servers share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one daemon, in a registry of their own. Every method is thread-safe."""

    def __init__(self, state: Callable[[], Mapping[str, int | float]]) -> None:
        """`state` gives the numbers that are looked up at each scrape, by name."""
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "agentmem_http_requests", "requests by route and status", ["route", "status"], registry=registry
        )
        self._queries = Counter("agentmem_prefix_cache_queries", "prompt tokens looked up", registry=registry)
        self._hits = Counter("agentmem_prefix_cache_hits", "prompt tokens reused exactly", registry=registry)
        self._composed = Counter(
            "agentmem_composed_tokens", "prompt tokens put together from elsewhere", registry=registry
        )
        self._prefilled = Counter("agentmem_prefilled_tokens", "prompt tokens computed", registry=registry)
        self._generated = Counter("agentmem_generated_tokens", "reply tokens", registry=registry)
        self._committed = Counter("agentmem_committed_bytes", "bytes of state written", registry=registry)
        self._ttft = Histogram(
            "agentmem_time_to_first_token_seconds",
            "from the request's arrival to its first text",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        registry.register(_State(state))

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def first_text(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def finished(self, usage: Mapping[str, Any]) -> None:
        """Count one turn by its usage object."""
        memory = usage.get("agentmem") or {}
        self._queries.inc(usage.get("prompt_tokens", 0))
        self._hits.inc((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        self._generated.inc(usage.get("completion_tokens", 0))
        self._composed.inc(memory.get("composed_tokens", 0))
        self._prefilled.inc(memory.get("prefilled_tokens", 0))
        self._committed.inc(memory.get("bytes_written", 0))

    def render(self) -> bytes:
        """The text exposition format. Asks for the daemon's state, so it may block."""
        return generate_latest(self._registry)


class _State(Collector):
    """Gauges that are read when somebody looks."""

    def __init__(self, state: Callable[[], Mapping[str, int | float]]) -> None:
        self._state = state

    def describe(self) -> Iterator[GaugeMetricFamily]:
        # Named, so that registering does not collect: the daemon's state is not there yet.
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._state().items():
            yield GaugeMetricFamily(f"agentmem_{name}", name.replace("_", " "), value=value)

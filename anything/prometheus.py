"""Prometheus metrics: counters and histograms of a server, and of each model version that it routes to.

Each server and each router has a registry of its own, so several live in one process. Latencies are histograms, whose
buckets add up over replicas.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anything.protocol import EngineStatus

# Latencies kept for the quantiles of `VersionStats.describe`: p99 within 1 % needs a few hundred, and old ones must
# leave.
_WINDOW = 1024
_QUANTILES = (0.5, 0.95, 0.99)
# Seconds; vLLM's buckets of the time to the first token (vllm/v1/metrics/loggers.py), which span milliseconds of a
# small model and minutes of a long answer.
_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_VERSION = ["version"]


class ServerMetrics:
    """Counters of one server's HTTP responses and tokens."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.responses = Counter("anything_responses", "Responses by HTTP status.", ["status"], registry=registry)
        self.disconnects = Counter(
            "anything_disconnects", "Requests whose client went away before the answer.", registry=registry
        )
        self.prompt_tokens = Counter("anything_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self.completion_tokens = Counter(
            "anything_completion_tokens", "Generated tokens of finished requests.", registry=registry
        )
        self.latency = Histogram(
            "anything_request_seconds", "Seconds from request to last token.", buckets=_BUCKETS, registry=registry
        )

    def exposition(self, status: EngineStatus) -> str:
        """Metrics of the server and its engine in Prometheus' text format, version 0.0.4."""
        gauges = CollectorRegistry()
        for name, value in status.gauges.items():
            Gauge(f"anything_{name}", f"Current {name.replace('_', ' ')}.", registry=gauges).set(value)
        registries = [self._registry, gauges, *([status.registry] if status.registry is not None else [])]
        return "".join(generate_latest(registry).decode() for registry in registries)


class VersionMetrics:
    """Counters and latencies of every model version that requests were routed to."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"anything_version_{name}", text, _VERSION, registry=registry)
            for name, text in (
                ("requests", "Requests routed to the version."),
                ("errors", "Requests that the version failed, or answered too late."),
                ("cancelled", "Requests that the client gave up."),
            )
        }
        self._latency = Histogram(
            "anything_version_seconds", "Seconds to the last token.", _VERSION, buckets=_BUCKETS, registry=registry
        )
        self._first_token = Histogram(
            "anything_version_first_token_seconds",
            "Seconds to the first token.",
            _VERSION,
            buckets=_BUCKETS,
            registry=registry,
        )
        self._versions: dict[str, VersionStats] = {}

    def of(self, version: str) -> VersionStats:
        """Metrics of one version, from zero when it was not seen before."""
        if version not in self._versions:
            requests, errors, cancelled = (counter.labels(version) for counter in self._counters.values())
            self._versions[version] = VersionStats(
                requests=requests,
                errors=errors,
                cancelled=cancelled,
                latency=Latencies(self._latency.labels(version)),
                first_token=Latencies(self._first_token.labels(version)),
            )
        return self._versions[version]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Counts, newest error and latency quantiles (seconds) of each version, as JSON."""
        return {
            version: {
                **{name: self._count(name, version) for name in self._counters},
                "last_error": stats.last_error,
                "latency_s": stats.latency.quantiles(),
                "first_token_s": stats.first_token.quantiles(),
            }
            for version, stats in self._versions.items()
        }

    def _count(self, name: str, version: str) -> int:
        return int(self.registry.get_sample_value(f"anything_version_{name}_total", {"version": version}) or 0)


class Latencies:
    """A histogram, and quantiles over its newest observations."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._newest: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, seconds: float) -> None:
        """Add one observation."""
        self._histogram.observe(seconds)
        self._newest.append(seconds)

    def quantiles(self) -> dict[str, float]:
        """`p50`, `p95` and `p99` in seconds (nearest rank); empty before the first observation."""
        ordered = sorted(self._newest)
        return {f"p{q * 100:g}": ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in _QUANTILES if ordered}


@dataclass
class VersionStats:
    """Metrics of one model version."""

    requests: Counter
    errors: Counter
    cancelled: Counter
    latency: Latencies
    first_token: Latencies
    last_error: str | None = None
    """Sentence of the newest error."""

    def fail(self, reason: str) -> None:
        """Count an error, and keep its reason."""
        self.errors.inc()
        self.last_error = reason

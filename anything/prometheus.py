"""Owns the counters of a server: requests by status, and requests, errors and latency by model version.

It knows nothing of HTTP or engines; it is written and read on the event loop only, so it needs no lock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

# Latencies kept for the quantiles: at 1 % error on p99 a few hundred are needed, and old ones must fade.
_WINDOW = 1024
_QUANTILES = (0.5, 0.95, 0.99)


class Latencies:
    """Quantiles over the newest observations."""

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self._newest: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, seconds: float) -> None:
        """Add one observation."""
        self.count += 1
        self.total_s += seconds
        self._newest.append(seconds)

    def quantiles(self) -> dict[str, float]:
        """`p50`, `p95` and `p99` in seconds (nearest rank); empty before the first observation."""
        ordered = sorted(self._newest)
        return {f"p{q * 100:g}": ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in _QUANTILES if ordered}


class VersionStats:
    """What happened to the requests that one model version was asked."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.cancelled = 0
        self.latency = Latencies()
        self.first_token = Latencies()

    def describe(self) -> dict[str, Any]:
        """The numbers as JSON; times in seconds."""
        return {
            "requests": self.requests,
            "errors": self.errors,
            "cancelled": self.cancelled,
            "latency_s": self.latency.quantiles(),
            "first_token_s": self.first_token.quantiles(),
        }


class ServerMetrics:
    """The gateway's own counters."""

    def __init__(self) -> None:
        self.responses: Counter[int] = Counter()
        self.disconnects = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.latency = Latencies()

    def exposition(self, gauges: Mapping[str, float], versions: Mapping[str, VersionStats]) -> str:
        """Everything in Prometheus' text format (version 0.0.4)."""
        statuses = [({"status": str(status)}, float(n)) for status, n in sorted(self.responses.items())]
        lines = _family("anything_responses_total", "counter", statuses)
        lines += _family("anything_disconnects_total", "counter", [({}, self.disconnects)])
        lines += _family("anything_prompt_tokens_total", "counter", [({}, self.prompt_tokens)])
        lines += _family("anything_completion_tokens_total", "counter", [({}, self.completion_tokens)])
        lines += _summary("anything_request_seconds", [({}, self.latency)])
        for name, value in gauges.items():
            lines += _family(f"anything_{name}", "gauge", [({}, value)])
        for name in ("requests", "errors", "cancelled"):
            samples = [({"version": version}, float(getattr(stats, name))) for version, stats in versions.items()]
            if samples:
                lines += _family(f"anything_version_{name}_total", "counter", samples)
        if versions:
            lines += _summary("anything_version_seconds", [({"version": v}, s.latency) for v, s in versions.items()])
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, samples: Iterable[tuple[dict[str, str], float]]) -> list[str]:
    return [f"# TYPE {name} {kind}", *(f"{name}{_labels(labels)} {value:g}" for labels, value in samples)]


def _summary(name: str, samples: Iterable[tuple[dict[str, str], Latencies]]) -> list[str]:
    lines = [f"# TYPE {name} summary"]
    for labels, latencies in samples:
        for quantile, value in latencies.quantiles().items():
            share = {**labels, "quantile": f"{float(quantile[1:]) / 100:g}"}
            lines.append(f"{name}{_labels(share)} {value:g}")
        lines.append(f"{name}_sum{_labels(labels)} {latencies.total_s:g}")
        lines.append(f"{name}_count{_labels(labels)} {latencies.count:g}")
    return lines


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"

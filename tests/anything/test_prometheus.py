"""Prometheus metrics: text that its parser reads, servers that count for themselves, and quantiles of each version."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from anything.prometheus import ServerMetrics, VersionMetrics
from anything.protocol import EngineStatus
from anything.testing import EchoEngine

Serve = Callable[..., str]


PATH = "/v1/anything/infer"


def body(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"prompt": prompt, **more}


def test_metrics_are_prometheus_text(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine())
    ask.post(url + PATH, json=body())
    ask.post(url + PATH, json={})
    text = ask.get(url + "/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("anything_") for name in families), "nothing but this server's own"
    samples = {(sample.name, *sample.labels.values()): sample.value for f in families.values() for sample in f.samples}
    assert samples["anything_responses_total", "200"] == samples["anything_responses_total", "422"] == 1
    assert samples["anything_completion_tokens_total",] == 3
    assert samples["anything_in_flight",] == 0
    assert families["anything_request_seconds"].type == "histogram"
    assert samples["anything_request_seconds_bucket", "+Inf"] == samples["anything_request_seconds_count",] == 1


def test_servers_of_one_process_count_for_themselves(serve: Serve, ask: httpx.Client) -> None:
    first, second = serve(EchoEngine()), serve(EchoEngine())
    ask.post(first + PATH, json=body())
    assert "anything_request_seconds_count 1.0" in ask.get(first + "/metrics").text
    assert "anything_request_seconds_count 0.0" in ask.get(second + "/metrics").text


def test_each_version_has_its_own_counts_and_quantiles() -> None:
    versions = VersionMetrics()
    for _ in range(3):
        versions.of("v1").requests.inc()
    versions.of("v2").errors.inc()
    for hundredth in range(1, 101):
        versions.of("v1").latency.observe(hundredth / 100)
    described = versions.describe()
    assert [described["v1"][name] for name in ("requests", "errors", "cancelled")] == [3, 0, 0]
    assert described["v1"]["latency_s"] == {"p50": 0.51, "p95": 0.96, "p99": 1.0}
    assert described["v1"]["first_token_s"] == {}, "nothing was observed"
    assert [described["v2"][name] for name in ("requests", "errors", "cancelled")] == [0, 1, 0]
    assert versions.registry.get_sample_value("anything_version_seconds_count", {"version": "v1"}) == 100


def test_quantiles_forget_old_observations_and_the_histogram_does_not() -> None:
    stats = VersionMetrics().of("v1")
    for seconds in [9.0] * 10 + [0.5] * 1024:
        stats.latency.observe(seconds)
    assert stats.latency.quantiles() == {"p50": 0.5, "p95": 0.5, "p99": 0.5}


def test_an_engines_gauges_and_its_registry_are_in_the_same_text() -> None:
    versions = VersionMetrics()
    versions.of("v1").requests.inc()
    text = ServerMetrics().exposition(EngineStatus({"cache_blocks_free": 7.0}, versions.registry))
    assert "anything_cache_blocks_free 7.0\n" in text
    assert 'anything_version_requests_total{version="v1"} 1.0\n' in text
    assert "anything_in_flight" not in text

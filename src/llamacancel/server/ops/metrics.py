"""Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from ...engine import EngineSnapshot, RequestView

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class _EngineState(Collector):
    """What the engine is doing at the moment of the scrape."""

    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        busy = sum(slot.state != "idle" for slot in now.slots)
        yield GaugeMetricFamily("llamacancel_slots", "Slots of the engine.", value=len(now.slots))
        yield GaugeMetricFamily("llamacancel_slots_busy", "Slots that work on a request.", value=busy)
        yield GaugeMetricFamily("llamacancel_queue_length", "Requests that wait for a slot.", value=len(now.queue))
        yield GaugeMetricFamily("llamacancel_queue_limit", "Requests that may wait.", value=now.queue_limit)
        yield CounterMetricFamily("llamacancel_steps", "Batches that the engine has decoded.", value=now.steps)


class Metrics:
    """Counts what becomes of requests.

    Args:
        snapshot: The engine's `snapshot`.
    """

    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(_EngineState(snapshot))
        self._requests = Counter(
            "llamacancel_requests",
            "Generations and embeddings that have ended.",
            ["endpoint", "finish_reason"],
            registry=self.registry,
        )
        self._answers = Counter(
            "llamacancel_http_answers", "HTTP answers.", ["endpoint", "status"], registry=self.registry
        )
        self._queue = Histogram(
            "llamacancel_queue_seconds",
            "Time from a request's arrival to its slot.",
            buckets=QUEUE_BUCKETS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "llamacancel_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=QUEUE_BUCKETS,
            registry=self.registry,
        )
        self._cancel = Histogram(
            "llamacancel_cancel_latency_seconds",
            "Time from a cancel to the slot being free.",
            ["cause"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._disconnects = Counter(
            "llamacancel_disconnects", "Clients that hung up before their answer.", ["endpoint"], registry=self.registry
        )
        self._prompt = Counter("llamacancel_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._cached = Counter(
            "llamacancel_cached_tokens", "Tokens of prompts that a slot still held.", registry=self.registry
        )
        self._generated = Counter("llamacancel_generated_tokens", "Tokens of answers.", registry=self.registry)

    def ended(self, endpoint: str, view: RequestView) -> None:
        """Count a generation or embedding that has ended."""
        self._requests.labels(endpoint, view.finish_reason or "error").inc()
        begun = view.started_at if view.started_at is not None else view.finished_at
        if begun is not None:
            self._queue.observe(max(begun - view.submitted_at, 0.0))
        if view.first_token_at is not None:
            self._first_token.observe(max(view.first_token_at - view.submitted_at, 0.0))
        if view.cancel_latency is not None:
            self._cancel.labels(view.cause or "none").observe(view.cancel_latency)
        if view.started_at is not None:
            self._prompt.inc(view.prompt_tokens)
            self._cached.inc(view.cached_tokens)
        self._generated.inc(view.completion_tokens)

    def answered(self, endpoint: str, status: int) -> None:
        """Count an HTTP answer."""
        self._answers.labels(endpoint, str(status)).inc()

    def disconnected(self, endpoint: str) -> None:
        """Count a client that hung up."""
        self._disconnects.labels(endpoint).inc()

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)

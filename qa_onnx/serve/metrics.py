"""What Prometheus reads at `/metrics`: counts and times, no text."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qa_onnx.errors import ClosedError
from qa_onnx.serve.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The service's own registry, so that two services in one process keep apart."""

    def __init__(self, service: Service) -> None:
        """Registers everything."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "qa_onnx_requests", "Requests, by route and status.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "qa_onnx_request_seconds",
            "Time from a request's headers to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_ServiceCollector(service))

    def note(self, *, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class _ServiceCollector(Collector):
    """What service and answerer count themselves, read when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The counts now; of an answerer that was closed there are none."""
        service = self._service
        yield CounterMetricFamily("qa_onnx_questions", "Questions that were answered.", service.answered)
        yield GaugeMetricFamily(
            "qa_onnx_queue_questions", "Questions that wait or are answered.", service.admission.questions
        )
        yield GaugeMetricFamily(
            "qa_onnx_queue_characters", "Characters of their contexts and questions.", service.admission.characters
        )
        yield GaugeMetricFamily("qa_onnx_draining", "1 where no more requests are taken.", float(service.is_draining))
        try:
            stats = service.answerer.stats()
        except ClosedError:
            return
        engine, cache = stats.engine, stats.prefix_cache
        for name, text, gauge in (
            ("sequences_waiting", "Sequences that wait; a question has one for each window.", stats.waiting),
            ("sequences_running", "Sequences that are computed.", stats.running),
            ("prefix_cache_bytes", "Bytes of keys and values in the prefix cache.", cache.nbytes),
        ):
            yield GaugeMetricFamily(f"qa_onnx_{name}", text, gauge)
        for name, text, count in (
            (
                "prefill_tokens",
                "Tokens of prompts that were computed, without those found in the prefix cache.",
                engine.prefill_tokens,
            ),
            ("decode_tokens", "Tokens of answers that were computed.", engine.decode_tokens),
            ("prefix_cache_hits", "Contexts that were found in the prefix cache.", cache.hits),
            ("prefix_cache_misses", "Contexts that were not.", cache.misses),
            ("prefix_cache_evictions", "Contexts that made room for others.", cache.evictions),
        ):
            yield CounterMetricFamily(f"qa_onnx_{name}", text, count)

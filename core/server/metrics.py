"""What an operator sees: Prometheus metrics, vLLM's names under infopt's prefix.

What requests met is counted here as it happens; what the engine counts is asked of it when somebody
looks, and goes on counting across its restarts.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from infopt.core.runtime.stats import STEP_SIZES

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "infopt"
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0),
)
_GAUGES = {
    "num_requests_running": ("running", "Requests in the engine's steps."),
    "num_requests_waiting": ("waiting", "Requests that wait for a place in them."),
    "kv_blocks_used": ("blocks_used", "Blocks of the KV cache that requests hold."),
    "kv_blocks_free": ("blocks_free", "Blocks that none holds."),
    "kv_blocks_cached": ("blocks_cached", "Free blocks whose content can still be found."),
    "kv_blocks_total": ("blocks_total", "Blocks of the KV cache."),
    "prefix_host_bytes": ("host_bytes", "Prefixes held in host memory."),
    "prefix_disk_bytes": ("disk_bytes", "Prefixes held on disk."),
    "step_tokens": ("step_tokens", "Tokens of the last step."),
}
_COUNTERS = {
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked for in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found there."),
    "num_preemptions": ("preemptions", "Requests that gave their blocks back."),
    "engine_steps": ("steps", "Steps of the engine."),
    "schedule_seconds": ("schedule_s", "Time that steps spent in scheduling."),
    "build_seconds": ("build_s", "Time that steps spent in building the batch."),
    "forward_seconds": ("forward_s", "Time that steps spent in the forward pass."),
    "sample_seconds": ("sample_s", "Time that steps spent in sampling."),
}


class Metrics:
    """All of one server; every sample has the label model_name, as vLLM's."""

    def __init__(self, model: str, cache_config: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineFigures(model, cache_config or {})
        self.registry.register(self.engine)
        self._model = model
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were answered.")
        self._success = self._counter(
            "request_success", "Answers that ended, by why.", "finished_reason"
        )
        self._rejections = self._counter(
            "admission_rejections", "Requests refused at the door, by why.", "reason"
        )
        self._http = self._counter(
            "http_requests", "HTTP requests, by what came of them.", "path", "status", "client"
        )
        self.ttft = self._seconds("time_to_first_token", "From the request to its first token.")
        self.itl = self._seconds("inter_token_latency", "Between two tokens of an answer.")
        self.e2e = self._seconds("e2e_request_latency", "From the request to the answer's end.")
        self.queue_time = self._seconds("request_queue_time", "In the engine's queue.")
        self.prefill_time = self._seconds("request_prefill_time", "From there to the first token.")
        self.decode_time = self._seconds("request_decode_time", "From there to the end.")

    def answered(self, reason: str) -> None:
        """An answer ended."""
        self._success.labels(self._model, reason).inc()

    def rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejections.labels(self._model, reason).inc()

    def responded(self, path: str, status: int, client: str) -> None:
        """An HTTP request is over; `path` is one of few."""
        self._http.labels(self._model, path, str(status), client).inc()

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        found = Counter(f"{_PREFIX}:{name}", told, ("model_name", *labels), registry=self.registry)
        return found if labels else found.labels(self._model)

    def _seconds(self, name: str, told: str) -> Histogram:
        found = Histogram(
            f"{_PREFIX}:{name}_seconds",
            told,
            ("model_name",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        return found.labels(self._model)


class EngineFigures(Collector):
    """What the engine said last, its sums carried on over its restarts."""

    def __init__(self, model: str, cache_config: Mapping[str, str]) -> None:
        self.restarts = 0
        self._model, self._config = model, dict(cache_config)
        self._last: dict[str, Any] | None = None
        self._before: dict[str, float] = {}
        self._sizes_before = [0] * (len(STEP_SIZES) + 1)
        self._tokens_before = 0.0

    def heard(self, stats: Mapping[str, Any]) -> None:
        """Take in what the engine counts now."""
        self._last = dict(stats)

    def lost(self) -> None:
        """The engine is gone: of its sums those heard last are kept, and it holds nothing."""
        if self._last is None:
            return
        for source, _ in _COUNTERS.values():
            self._before[source] = self._before.get(source, 0) + self._last[source]
        sizes = zip(self._sizes_before, self._last["step_sizes"], strict=True)
        self._sizes_before = [before + last for before, last in sizes]
        self._tokens_before += self._last["tokens"]
        self._last = None

    def collect(self) -> Iterable[Metric]:
        last = self._last or {}
        yield self._gauge("engine_up", "Whether there is an engine.", float(bool(last)))
        total, used = last.get("blocks_total", 0), last.get("blocks_used", 0)
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the KV cache in use.", used / total if total else 0.0
        )
        for name, (source, told) in _GAUGES.items():
            yield self._gauge(name, told, last.get(source, 0))
        for name, (source, told) in _COUNTERS.items():
            value = self._before.get(source, 0) + last.get(source, 0)
            yield self._counter(name, told, value)
        yield self._counter(
            "engine_restarts", "Engines that took a dead one's place.", self.restarts
        )
        yield from self._steps(last)
        if self._config:
            info = InfoMetricFamily(
                f"{_PREFIX}:cache_config", "The KV cache.", labels=("model_name",)
            )
            info.add_metric((self._model,), self._config)
            yield info

    def _steps(self, last: Mapping[str, Any]) -> Iterator[Metric]:
        told = "Tokens of a step."
        found = HistogramMetricFamily(
            f"{_PREFIX}:iteration_tokens_total", told, labels=("model_name",)
        )
        sizes = last.get("step_sizes") or [0] * len(self._sizes_before)
        counted, buckets = 0, []
        for bound, before, now in zip(
            (*map(float, STEP_SIZES), float("inf")), self._sizes_before, sizes, strict=True
        ):
            counted += before + now
            buckets.append(("+Inf" if bound == float("inf") else str(bound), counted))
        found.add_metric(
            (self._model,), buckets, sum_value=self._tokens_before + last.get("tokens", 0)
        )
        yield found

    def _gauge(self, name: str, told: str, value: float) -> Metric:
        found = GaugeMetricFamily(f"{_PREFIX}:{name}", told, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found

    def _counter(self, name: str, told: str, value: float) -> Metric:
        found = CounterMetricFamily(f"{_PREFIX}:{name}", told, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found

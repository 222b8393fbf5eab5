"""OpenTelemetry: each request as a span, and its way through the engine as spans within it.

They go to a collector by OTLP over HTTP, from a thread of their own; one that cannot be reached
costs the spans and no request. Names are those of OpenTelemetry's conventions for HTTP and
generative AI. What the environment says (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, ...) holds.
"""

import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from urllib.parse import urlsplit

from infopt.core.errors import MissingExtraError, UsageError
from infopt.core.server.log import is_told
from infopt.core.server.visit import Passage, Visit

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as missing:
    raise MissingExtraError("opentelemetry-sdk", "otel") from missing

TRACES_PATH = "/v1/traces"
_TIMEOUT_S = 5.0
"""For one batch of spans, and for the last of them when the server ends."""
_LIBRARY = "opentelemetry"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
Value = str | int | float | bool | list[str]


class Spans:
    """Tells an exporter of visits, in batches, without waiting for it."""

    def __init__(
        self, exporter: SpanExporter, model: str, trouble: Callable[[str], None] | None = None
    ) -> None:
        """`trouble` is told, once, of spans that could not be handed over."""
        told = {"service.name": "infopt", "service.version": version("infopt")}
        resource = Resource(told).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("infopt.serve", version("infopt"))
        self._model = model
        self._parent = TraceContextTextMapPropagator()
        self._listener = _Trouble(trouble or (lambda note: None))
        self._library = logging.getLogger(_LIBRARY)
        self._propagated, self._library.propagate = self._library.propagate, False
        self._library.addHandler(self._listener)

    def visit(self, visit: Visit) -> None:
        """Tell of one that is over; probes are told of only where they failed."""
        if not is_told(visit):
            return
        clock = _Clock()
        span = self._tracer.start_span(
            f"{visit.method} {visit.path}",
            context=self._parent.extract(visit.trace),
            kind=SpanKind.SERVER,
            start_time=clock.at(visit.received),
            attributes=self._attributes(visit),
        )
        if span.is_recording():
            if visit.outcome >= 500:
                span.set_status(Status(StatusCode.ERROR, visit.fault or str(visit.outcome)))
            within = set_span_in_context(span)
            for passage in visit.passages:
                self._passage(passage, within, clock)
        span.end(clock.now)

    def close(self) -> None:
        """Hand over what is left, within a few seconds."""
        self._provider.force_flush(int(_TIMEOUT_S * 1000))
        self._provider.shutdown()
        self._library.removeHandler(self._listener)
        self._library.propagate = self._propagated

    def _attributes(self, visit: Visit) -> Mapping[str, Value]:
        found: dict[str, Value] = {
            "http.request.method": visit.method,
            "url.path": visit.path,
            "http.response.status_code": visit.outcome,
            "infopt.request_id": visit.id,
            "infopt.client": visit.client,
        }
        if visit.fault is not None:
            found["error.type"] = visit.fault
        if (operation := _OPERATIONS.get(visit.path)) is not None:
            found |= {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "infopt",
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": visit.prompt_tokens,
                "gen_ai.usage.output_tokens": visit.output_tokens,
                "gen_ai.response.finish_reasons": list(visit.finish_reasons),
                "infopt.cached_tokens": visit.cached_tokens,
            }
        if visit.ttft is not None:
            found["gen_ai.server.time_to_first_token"] = visit.ttft
        return found

    def _passage(self, passage: Passage, within: Context, clock: "_Clock") -> None:
        """Three spans of one prompt: it waits, it is read, it is answered."""
        joined = None if passage.waited is None else passage.began + passage.waited
        for name, start, end in (
            ("queue", passage.began, joined or passage.ended),
            ("prefill", joined, passage.first or passage.ended),
            ("decode", passage.first, passage.ended),
        ):
            if start is not None:
                span: Span = self._tracer.start_span(
                    name, context=within, start_time=clock.at(start)
                )
                span.end(clock.now if end is None else clock.at(max(start, end)))


class _Clock:
    """What the steady clock's times are on the wall, in ns since 1970."""

    def __init__(self) -> None:
        self.now = time.time_ns()
        self._steady = time.monotonic()

    def at(self, steady: float) -> int:
        return self.now - int((self._steady - steady) * 1e9)


class _Trouble(logging.Handler):
    """The library tells of failures by its loggers, again and again: once is enough."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._told = tell, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            self._tell(f"spans cannot be handed over: {record.getMessage()}")


def exporting(endpoint: str, model: str, trouble: Callable[[str], None]) -> Spans:
    """Spans for the collector at a URL such as http://127.0.0.1:4318. Raises UsageError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"{endpoint!r} is no address of a collector",
            "give one such as http://127.0.0.1:4318 (OTLP over HTTP)",
        )
    url = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + TRACES_PATH
    return Spans(OTLPSpanExporter(url, timeout=_TIMEOUT_S), model, trouble)

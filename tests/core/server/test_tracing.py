"""Spans as a collector gets them: from visits that are made up, and from a real server."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infopt.core.errors import UsageError
from infopt.core.server.tracing import Spans, exporting
from infopt.core.server.visit import Passage, Visit

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.services: list[str] = []
        self.spans: list[Any] = []
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                told.paths.append(self.path)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    said = {a.key: a.value.string_value for a in resource.resource.attributes}
                    told.services.append(said["service.name"])
                    told.spans += [s for scope in resource.scope_spans for s in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def told(*visits: Callable[[float], Visit]) -> list[ReadableSpan]:
    """The spans of visits that are made of the present time."""

    async def tell() -> None:  # a visit belongs to a loop
        for visit in visits:
            spans.visit(visit(time.monotonic()))

    memory = InMemorySpanExporter()
    spans = Spans(memory, "tiny")
    asyncio.run(tell())
    spans.close()
    return list(memory.get_finished_spans())


def chat(now: float) -> Visit:
    return Visit(
        "abc",
        "POST",
        "/v1/chat/completions",
        trace={"traceparent": PARENT},
        received=now - 10,
        status=200,
        prompt_tokens=7,
        output_tokens=3,
        cached_tokens=4,
        first_token=now - 5,
        passages=[Passage(now - 9, waited=1.0, first=now - 5, ended=now - 2)],
        finish_reasons=["stop"],
    )


def test_a_request_and_its_way_through_the_engine() -> None:
    spans = {span.name: span for span in told(chat)}
    assert set(spans) == {"POST /v1/chat/completions", "queue", "prefill", "decode"}
    whole = spans.pop("POST /v1/chat/completions")
    assert whole.context is not None and whole.parent is not None
    assert f"{whole.context.trace_id:032x}" == PARENT[3:35]
    assert f"{whole.parent.span_id:016x}" == PARENT[36:52]
    assert whole.attributes is not None
    for key, value in {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "infopt.cached_tokens": 4,
        "infopt.request_id": "abc",
        "http.response.status_code": 200,
    }.items():
        assert whole.attributes[key] == value
    assert whole.attributes["gen_ai.server.time_to_first_token"] == pytest.approx(5.0)
    assert seconds(whole) == pytest.approx(10, abs=1)
    for name, long in {"queue": 1, "prefill": 3, "decode": 3}.items():
        assert seconds(spans[name]) == pytest.approx(long, abs=1e-3)
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == whole.context.span_id
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time


def test_what_never_left_the_queue_has_no_other_spans() -> None:
    def gone(now: float) -> Visit:
        ways = [Passage(now - 1, ended=now)]
        return Visit("x", "POST", "/v1/completions", received=now - 1, passages=ways, fault="gone")

    spans = {span.name: span for span in told(gone)}
    assert set(spans) == {"POST /v1/completions", "queue"}
    whole = spans["POST /v1/completions"]
    assert whole.attributes is not None
    assert (whole.attributes["http.response.status_code"], whole.attributes["error.type"]) == (
        499,
        "gone",
    )


def test_probes_are_told_of_only_where_they_failed() -> None:
    fine = told(lambda now: Visit("x", "GET", "/health", status=200))
    assert fine == []
    (span,) = told(lambda now: Visit("x", "GET", "/health", status=503))
    assert not span.status.is_ok


def test_a_trace_that_was_not_sampled_stays_so() -> None:
    def unsampled(now: float) -> Visit:
        visit = chat(now)
        visit.trace = {"traceparent": PARENT[:-2] + "00"}
        return visit

    assert told(unsampled) == []


def test_a_real_server_tells_a_real_collector(
    launch: Callable[..., Any], collector: Collector
) -> None:
    server = launch(otlp_endpoint=collector.url).ready()
    body: Any = {"model": "tiny", "prompt": ["The sea", "A ship"], "max_tokens": 3}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body, headers={"traceparent": PARENT}, timeout=60
    )
    assert answer.status_code == 200
    assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
    assert server.stop() == 0  # what is left is handed over before the end
    assert set(collector.paths) == {"/v1/traces"}
    assert set(collector.services) == {"infopt"}
    names = sorted(span.name for span in collector.spans)
    assert names == ["POST /v1/completions", *["decode"] * 2, *["prefill"] * 2, *["queue"] * 2]
    assert {span.trace_id.hex() for span in collector.spans} == {PARENT[3:35]}
    (whole,) = (span for span in collector.spans if span.name[:4] == "POST")
    used = {a.key: a.value.int_value for a in whole.attributes}
    assert used["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert used["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    for span in collector.spans:
        assert whole.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano


def test_a_collector_that_is_away_costs_no_request(launch: Callable[..., Any]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    server = launch(otlp_endpoint=f"http://127.0.0.1:{port}").ready()
    for _ in range(3):
        body = {"prompt": "The sea", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
    assert server.stop() == 0
    warned = [line for line in server.lines if "spans cannot be handed over" in line]
    assert len(warned) == 1


@pytest.mark.parametrize("address", ["", "localhost:4318", "grpc://x:1", "http://"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="no address of a collector"):
        exporting(address, "tiny", print)


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9

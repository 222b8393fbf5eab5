"""The routes: OpenAI's completions, chat completions and models, and the health of the engine."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from infopt.core.errors import InfoptError
from infopt.core.recipe.serve import Pooling, ToolParser
from infopt.core.runtime.request import SamplingParams
from infopt.core.server.chat import ChatRequest
from infopt.core.server.doorway import Doorway, House
from infopt.core.server.embeddings import add_embeddings
from infopt.core.server.faults import ApiError, api_error, error_response
from infopt.core.server.metrics import CONTENT_TYPE
from infopt.core.server.page import add_page
from infopt.core.server.prompts import Prompts
from infopt.core.server.protocol import (
    COMPLETION_TOKENS,
    Body,
    CompletionRequest,
    StreamOptions,
    invalid,
)
from infopt.core.server.respond import ClientGone, EventStream, while_connected
from infopt.core.server.shape import ChatShape, CompletionShape, Echo, Shape, Usage, chunks, whole
from infopt.core.server.stream import Piece, merged, pieces
from infopt.core.server.supervisor import State
from infopt.core.server.tokens import add_tokens
from infopt.core.server.tools import ToolUse
from infopt.core.server.visit import Visit, visit_of
from infopt.core.server.watched import Generator, Watched

HEALTH_SECONDS = 10.0
METRICS_SECONDS = 2.0
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the document says beside JSON."""


class Engine(Generator, Protocol):
    """What the routes need of the engine."""

    state: State

    async def stats(self, timeout: float) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Service:
    """What is served: the engine, its tokenizer, and the name that clients ask for; to whom."""

    engine: Engine
    prompts: Prompts
    model: str
    embedding_size: int
    house: House
    tool_parser: ToolParser = "auto"
    pooling: Pooling = "mean"
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """A client that names no model means the one that is here."""
        if name not in (None, self.model):
            raise ApiError(
                404,
                f"the model {name!r} is not served here; {self.model!r} is",
                param="model",
                code="model_not_found",
            )

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it; the last two are extensions, one of them vLLM's."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "infopt",
            "max_model_len": self.prompts.max_model_len,
            "vocab_size": self.prompts.vocab_size,
        }

    def answer(
        self,
        visit: Visit,
        body: Body,
        prompts: list[list[int]],
        params: list[SamplingParams],
        tools: ToolUse | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The merged answers to all prompts, which have their places in the queue from now on.

        Nothing runs before the first piece is asked for. Raises ApiError where the queue is full.
        """
        engines = self.admitted(visit, prompts)
        salt = visit.salt(body.cache_salt)
        return merged(
            [
                pieces(
                    engine,
                    self.prompts.tokenizer,
                    prompt,
                    replace(chosen, cache_salt=salt),
                    stop=body.stop,
                    skip_special_tokens=body.skip_special_tokens,
                    tools=tools,
                    first=index * chosen.n,
                )
                for index, (engine, prompt, chosen) in enumerate(
                    zip(engines, prompts, params, strict=True)
                )
            ]
        )

    def admitted(self, visit: Visit, prompts: Sequence[Sequence[int]]) -> list[Watched]:
        """The engine for each of a visit's prompts, which have places in the queue from now on.

        Raises ApiError where the queue is full.
        """
        house = self.house
        try:
            places = house.gate.queue([len(prompt) for prompt in prompts])
        except ApiError as error:
            house.metrics.rejected(error.code)
            raise
        for prompt, place in zip(prompts, places, strict=True):
            visit.on_close(place.leave)
            visit.prompt_tokens += len(prompt)
            house.metrics.prompt_tokens.inc(len(prompt))
        return [Watched(self.engine, visit, place, house.metrics) for place in places]


def create_app(service: Service, cors_origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application, with its doorway."""
    app = FastAPI(title="infopt", docs_url=None, redoc_url=None, strict_content_type=False)

    @app.post("/v1/completions", responses=_STREAMED)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        prompts = await service.prompts.of_completion(body)
        asked = body.asked_tokens or COMPLETION_TOKENS
        room = [service.prompts.room(prompt, asked, "prompt") for prompt in prompts]
        params = [body.params(tokens) for tokens in room]
        echo = None
        if body.echo:
            echo = Echo(prompts, await service.prompts.echoes(body, prompts), params[0].n)
        shape = CompletionShape(
            service.model, service.prompts.tokenizer, body.logprobs is not None, echo
        )
        answer = service.answer(visit_of(request), body, prompts, params)
        return await _respond(request, body, answer, shape, prompts)

    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        prompt = await service.prompts.of_chat(body.messages, body.usable_tools)
        tools = await service.prompts.tools_of(body, service.tool_parser)
        room = service.prompts.room(prompt, body.asked_tokens, "messages")
        params = body.params(room, tools.grammar() if tools else None)
        short = tools is not None and tools.form.short_ids
        shape = ChatShape(service.model, service.prompts.tokenizer, bool(body.logprobs), short)
        answer = service.answer(visit_of(request), body, [prompt], [params], tools)
        return await _respond(request, body, answer, shape, [prompt])

    add_embeddings(app, service)
    add_tokens(app, service)
    add_page(app)
    _add_models(app, service)
    _add_health(app, service)
    _handle_faults(app)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    whole_app: ASGIApp = Doorway(app, house=service.house, paths=paths)
    if cors_origins:
        whole_app = CORSMiddleware(
            whole_app,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return whole_app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(service.card())


def _add_health(app: FastAPI, service: Service) -> None:
    """What probes and operators ask; no key is needed."""
    engine, house = service.engine, service.house

    @app.get("/health")
    async def health() -> Response:
        if engine.state is State.ASLEEP:
            return JSONResponse({"status": "asleep"})
        try:
            stats = await engine.stats(HEALTH_SECONDS)
        except InfoptError as error:
            return JSONResponse({"status": "unavailable", "reason": error.message}, 503)
        return JSONResponse({"status": "draining" if house.draining else "ok", "engine": stats})

    @app.get("/ready")
    async def ready() -> Response:
        state = "draining" if house.draining else str(engine.state)
        takes = state in (State.READY, State.ASLEEP)
        return JSONResponse({"status": state}, 200 if takes else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        with suppress(InfoptError):  # its last counts will do
            house.metrics.engine.heard(await engine.stats(METRICS_SECONDS))
        return Response(house.metrics.text(), media_type=CONTENT_TYPE)


async def _respond(
    request: Request,
    body: Body,
    answer: AsyncGenerator[Piece, None],
    shape: Shape,
    prompts: list[list[int]],
) -> Response:
    usage = Usage(sum(map(len, prompts)))
    if body.stream:
        return EventStream(chunks(answer, shape, usage, body.stream_options or StreamOptions()))
    work = whole(answer, shape, usage, len(prompts) * (body.n or 1))
    return JSONResponse(await while_connected(work, request.receive))


def _handle_faults(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _refused(request, invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = _refused(request, told)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    for kind in (ApiError, InfoptError, Exception):

        @app.exception_handler(kind)
        async def fault(request: Request, error: Exception) -> Response:
            return _refused(request, error)


def _refused(request: Request, error: Exception) -> Response:
    visit_of(request).fault = api_error(error).code
    return error_response(error)

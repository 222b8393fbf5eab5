"""The routes: OpenAI's completions, chat completions and models, and the health of the engine."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from infopt.core.errors import InfoptError
from infopt.core.recipe.serve import Pooling, ToolParser
from infopt.core.runtime.request import SamplingParams
from infopt.core.server.chat import ChatRequest
from infopt.core.server.embeddings import add_embeddings
from infopt.core.server.prompts import Prompts
from infopt.core.server.protocol import (
    COMPLETION_TOKENS,
    ApiError,
    Body,
    CompletionRequest,
    StreamOptions,
    invalid,
)
from infopt.core.server.respond import ClientGone, EventStream, error_response, while_connected
from infopt.core.server.shape import ChatShape, CompletionShape, Echo, Shape, Usage, chunks, whole
from infopt.core.server.stream import Generator, Piece, merged, pieces
from infopt.core.server.tokens import add_tokens
from infopt.core.server.tools import ToolUse

HEALTH_SECONDS = 10.0


class Engine(Generator, Protocol):
    """What the routes need of the engine."""

    async def stats(self, timeout: float) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Service:
    """What is served: the engine, its tokenizer, and the name that clients ask for."""

    engine: Engine
    prompts: Prompts
    model: str
    embedding_size: int
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
        body: Body,
        prompts: list[list[int]],
        params: list[SamplingParams],
        tools: ToolUse | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The merged answers to all prompts; nothing runs before the first piece is asked for."""
        return merged(
            [
                pieces(
                    self.engine,
                    self.prompts.tokenizer,
                    prompt,
                    chosen,
                    stop=body.stop,
                    skip_special_tokens=body.skip_special_tokens,
                    tools=tools,
                    first=index * chosen.n,
                )
                for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True))
            ]
        )


def create_app(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="infopt", docs_url=None, redoc_url=None, strict_content_type=False)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        prompts = await service.prompts.of_completion(body)
        asked = body.max_tokens or COMPLETION_TOKENS
        room = [service.prompts.room(prompt, asked, "prompt") for prompt in prompts]
        params = [body.params(tokens) for tokens in room]
        echo = None
        if body.echo:
            echo = Echo(prompts, await service.prompts.echoes(body, prompts), params[0].n)
        shape = CompletionShape(
            service.model, service.prompts.tokenizer, body.logprobs is not None, echo
        )
        answer = service.answer(body, prompts, params)
        return await _respond(request, body, answer, shape, prompts)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        prompt = await service.prompts.of_chat(body.messages, body.usable_tools)
        tools = await service.prompts.tools_of(body, service.tool_parser)
        asked = body.max_completion_tokens or body.max_tokens
        room = service.prompts.room(prompt, asked, "messages")
        params = body.params(room, tools.grammar() if tools else None)
        short = tools is not None and tools.form.short_ids
        shape = ChatShape(service.model, service.prompts.tokenizer, bool(body.logprobs), short)
        answer = service.answer(body, [prompt], [params], tools)
        return await _respond(request, body, answer, shape, [prompt])

    add_embeddings(app, service)
    add_tokens(app, service)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(service.card())

    @app.get("/health")
    async def health() -> Response:
        try:
            stats = await service.engine.stats(HEALTH_SECONDS)
        except InfoptError as error:
            return JSONResponse({"status": "unavailable", "reason": error.message}, 503)
        return JSONResponse({"status": "ok", "engine": stats})

    _handle_faults(app)
    return app


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
        return error_response(invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = error_response(told)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    for kind in (ApiError, InfoptError, Exception):

        @app.exception_handler(kind)
        async def fault(request: Request, error: Exception) -> Response:
            return error_response(error)

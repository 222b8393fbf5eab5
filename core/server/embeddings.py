"""/v1/embeddings: texts into vectors, through the engine like everything else."""

import base64
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from infopt.core.recipe.serve import Pooling
from infopt.core.runtime.request import SamplingParams
from infopt.core.server.faults import ApiError
from infopt.core.server.prompts import Prompts
from infopt.core.server.protocol import Given, Priority, TokenIds
from infopt.core.server.respond import while_connected
from infopt.core.server.stream import Generator, merged
from infopt.core.server.visit import Visit, visit_of

MAX_INPUTS = 2048
Vector = Sequence[float]


class Service(Protocol):
    """What this route needs of what is served."""

    @property
    def prompts(self) -> Prompts: ...

    @property
    def model(self) -> str: ...

    @property
    def pooling(self) -> Pooling: ...

    @property
    def embedding_size(self) -> int: ...

    def check_model(self, name: str | None) -> None: ...

    def admitted(self, visit: Visit, prompts: Sequence[Sequence[int]]) -> Sequence[Generator]: ...


class EmbeddingRequest(Given):
    """POST /v1/embeddings; the last three are extensions."""

    input: str | list[str] | TokenIds | list[TokenIds]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling | None = None
    """Of hidden states: their mean, or the last one; None is as the server was told."""
    priority: Priority = 0
    cache_salt: str = ""

    def inputs(self) -> list[Any]:
        """Texts or lists of tokens; ApiError for too many."""
        given: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        if given and isinstance(given[0], int):
            given = [given]
        if len(given) > MAX_INPUTS:
            raise ApiError(
                400,
                f"{len(given)} inputs in one request: at most {MAX_INPUTS}",
                param="input",
                code="invalid_value",
            )
        return given


def add_embeddings(app: FastAPI, service: Service) -> None:
    """Add the route to the app."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        service.check_model(body.model)
        size = service.embedding_size
        if body.dimensions not in (None, size):
            raise ApiError(
                400,
                f"dimensions: this model's embeddings have {size}, and mean nothing cut short",
                param="dimensions",
                code="unsupported_value",
            )
        prompts = await service.prompts.of_input(body.inputs(), "input")
        for prompt in prompts:
            service.prompts.check_length(prompt, "input")
        params = SamplingParams(
            pooling=body.pooling or service.pooling,
            priority=body.priority,
            cache_salt=visit_of(request).salt(body.cache_salt),
        )
        work = _embed_all(service.admitted(visit_of(request), prompts), prompts, params)
        found = await while_connected(work, request.receive)
        count = sum(map(len, prompts))
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": _told(vector, body)}
                    for index, vector in enumerate(found)
                ],
                "model": service.model,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )


async def _embed_all(
    engines: Sequence[Generator], prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Vector]:
    found: dict[int, Vector] = {}
    sources = [
        _embed(engine, index, prompt, params)
        for index, (engine, prompt) in enumerate(zip(engines, prompts, strict=True))
    ]
    async with aclosing(merged(sources)) as answers:
        async for index, vector in answers:
            found[index] = vector
    return [found[index] for index in range(len(prompts))]


async def _embed(
    engine: Generator, index: int, prompt: Sequence[int], params: SamplingParams
) -> AsyncGenerator[tuple[int, Vector], None]:
    async with aclosing(engine.generate(prompt, params)) as outputs:
        async for output in outputs:
            assert output.embedding is not None, "it is all that the engine says"
            yield index, output.embedding


def _told(vector: Vector, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)

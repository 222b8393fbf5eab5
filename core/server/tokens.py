"""/tokenize and /detokenize, as vLLM has them, and /version."""

from importlib.metadata import version
from typing import Any, ClassVar, Protocol

from fastapi import FastAPI
from pydantic import model_validator
from starlette.responses import JSONResponse, Response

from infopt.core.server.chat import Messages, check_messages
from infopt.core.server.prompts import Prompts
from infopt.core.server.protocol import Given, TokenIds
from infopt.core.server.structured import refused
from infopt.core.server.tools import Tools, check_tools


class Service(Protocol):
    """What these routes need of what is served."""

    @property
    def prompts(self) -> Prompts: ...

    def check_model(self, name: str | None) -> None: ...


class TokenizeRequest(Given):
    """POST /tokenize: a text, or a chat as /v1/chat/completions would read it."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "continue_final_message": (None, False),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "mm_processor_kwargs": (None, {}),
    }

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    """End where the answer begins."""
    add_special_tokens: bool | None = None
    """Those that the tokenizer puts around a text: by default of a prompt, whose template has
    written none."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) is (self.messages is None):
            raise refused("prompt", "or messages, one of the two, is needed")
        if self.messages is None:
            for key in ("tools", "add_generation_prompt"):
                if key in self.model_fields_set:
                    raise refused(key, "goes with messages")
        else:
            check_messages(self.messages)
            check_tools(self.tools or (), None)
        return self


class DetokenizeRequest(Given):
    """POST /detokenize."""

    tokens: TokenIds


def add_tokens(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""
    prompts = service.prompts

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        special = body.add_special_tokens
        if body.messages is not None:
            tokens = await prompts.of_chat(
                body.messages,
                body.tools or (),
                answered=body.add_generation_prompt,
                add_special_tokens=bool(special),
            )
        else:
            text = body.prompt or ""
            tokens = await prompts.tokens_of(text, add_special_tokens=special is not False)
        told: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": prompts.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if body.return_token_strs:
            names = prompts.tokenizer.convert_ids_to_tokens
            told["token_strs"] = await prompts.beside(lambda: names(tokens))
        return JSONResponse(told)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return JSONResponse({"prompt": await prompts.text_of(body.tokens)})

    @app.get("/version")
    async def told_version() -> Response:
        return JSONResponse({"version": version("infopt")})

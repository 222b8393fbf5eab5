"""Requests to token ids, and whether they fit; tokenizing runs beside the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from infopt.core.server.faults import ApiError
from infopt.core.server.protocol import ChatRequest, CompletionRequest

T = TypeVar("T")


class Prompts:
    """The tokenizer, in a thread of its own, with the limits of the engine."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of_completion(self, body: CompletionRequest) -> list[list[int]]:
        """One prompt or several, as texts or as tokens; ApiError for one that is empty."""
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
        prompts = await self._beside(
            lambda: [self._encode(item) if isinstance(item, str) else item for item in given]
        )
        for prompt in prompts:
            self._check_tokens(prompt)
        return prompts

    async def of_chat(self, body: ChatRequest) -> list[int]:
        """The conversation through the model's template; ApiError where that refuses it."""
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, "this model has no chat template: use /v1/completions", code="no_chat_template"
            )
        messages = [message.plain() for message in body.messages]
        try:
            prompt = await self._beside(lambda: self._render(messages))
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ApiError(
                400, f"the chat template refuses the messages: {reason}", param="messages"
            ) from error
        self._check_tokens(prompt)
        return prompt

    async def echoes(self, body: CompletionRequest, prompts: Sequence[list[int]]) -> list[str]:
        """The prompts' texts."""
        if isinstance(body.prompt, str):
            return [body.prompt]
        return await self._beside(lambda: [str(self.tokenizer.decode(p)) for p in prompts])

    def room(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """Tokens that the answer may have; ApiError if those asked for do not fit."""
        left = self.max_model_len - len(prompt)
        if left < (asked or 1):
            wish = f" and {asked} in the answer" if asked else ""
            raise ApiError(
                400,
                f"this model holds {self.max_model_len} tokens; "
                f"you asked for {len(prompt)} in the {param}{wish}",
                param=param,
                code="context_length_exceeded",
            )
        return asked or left

    async def _beside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text)
        return found

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def _check_tokens(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ApiError(400, "a prompt has no tokens", param="prompt", code="invalid_value")
        if max(prompt) >= self.vocab_size:
            raise ApiError(
                400,
                f"token {max(prompt)} is not among the model's {self.vocab_size}",
                param="prompt",
                code="invalid_value",
            )

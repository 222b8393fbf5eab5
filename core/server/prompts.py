"""Requests to token ids, and whether they fit; tokenizing runs beside the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from infopt.core.recipe.serve import ToolParser
from infopt.core.server.chat import ChatMessage, ChatRequest
from infopt.core.server.faults import ApiError
from infopt.core.server.protocol import CompletionRequest, check_count
from infopt.core.server.render import form_of, marks_of, render, template_of
from infopt.core.server.tool_parser import FORMS
from infopt.core.server.tools import NamedTool, Tool, ToolUse

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
        check_count(len(given), body)
        return await self.of_input(given, "prompt")

    async def of_input(self, given: Sequence[str | list[int]], param: str) -> list[list[int]]:
        """Texts or tokens as tokens; ApiError, naming the `param`, for what is empty or unknown."""
        if not given:
            raise ApiError(400, f"the {param} is empty", param=param, code="invalid_value")
        prompts = await self.beside(
            lambda: [self._encode(item) if isinstance(item, str) else item for item in given]
        )
        for prompt in prompts:
            self._check_tokens(prompt, param)
        return prompts

    async def of_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        *,
        answered: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """A conversation through the model's template; ApiError where that refuses it.

        The template writes the special tokens itself.
        """

        def work() -> list[int]:
            told = [message.plain() for message in messages]
            known = [tool.plain() for tool in tools]
            text = render(self.tokenizer, told, known, answered=answered)
            return self._encode(text, add_special_tokens=add_special_tokens)

        prompt = await self.beside(work)
        self._check_tokens(prompt, "messages")
        return prompt

    async def tools_of(self, body: ChatRequest, parser: ToolParser) -> ToolUse | None:
        """How the chat uses its tools, if it may; ApiError where it cannot."""
        tools, choice = tuple(body.usable_tools), body.tool_choice
        if not tools:
            return None
        form = form_of(parser, template_of(self.tokenizer, tools=True))
        named = isinstance(choice, NamedTool)
        forced = named or choice == "required"
        if form is None and not forced:
            raise ApiError(
                400,
                "tool_choice: this server looks for no calls (--tool-parser none): "
                "it can only be none, required or a function",
                param="tool_choice",
                code="unsupported_value",
            )
        if isinstance(choice, NamedTool):
            tools = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        form = form or FORMS["hermes"]
        use = ToolUse(
            tools,
            forced,
            single=named or body.parallel_tool_calls is False,
            form=form,
            mark_ids={} if forced else marks_of(self.tokenizer, form),
        )
        await self.beside(use.check_schemas)
        return use

    async def tokens_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A text that may be empty."""
        return await self.beside(lambda: self._encode(text, add_special_tokens=add_special_tokens))

    async def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones and all; ApiError for those that there are not."""
        self._check_known(tokens, "tokens")
        return await self.beside(lambda: str(self.tokenizer.decode(tokens)))

    def check_length(self, prompt: Sequence[int], param: str) -> None:
        """Raise ApiError for a prompt that is too long, if nothing is to follow it."""
        if len(prompt) > self.max_model_len:
            raise self._too_long(prompt, param)

    async def echoes(self, body: CompletionRequest, prompts: Sequence[list[int]]) -> list[str]:
        """The prompts' texts."""
        if isinstance(body.prompt, str):
            return [body.prompt]
        return await self.beside(lambda: [str(self.tokenizer.decode(p)) for p in prompts])

    def room(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """Tokens that the answer may have; ApiError if those asked for do not fit."""
        left = self.max_model_len - len(prompt)
        if left < (asked or 1):
            raise self._too_long(prompt, param, f" and {asked} in the answer" if asked else "")
        return asked or left

    async def beside(self, work: Callable[[], T]) -> T:
        """Do what only the tokenizer's thread may, or what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return found

    def _too_long(self, prompt: Sequence[int], param: str, wish: str = "") -> ApiError:
        return ApiError(
            400,
            f"this model holds {self.max_model_len} tokens; "
            f"you asked for {len(prompt)} in the {param}{wish}",
            param=param,
            code="context_length_exceeded",
        )

    def _check_tokens(self, prompt: Sequence[int], param: str) -> None:
        if not prompt:
            raise ApiError(
                400, f"{param}: there are no tokens in it", param=param, code="invalid_value"
            )
        self._check_known(prompt, param)

    def _check_known(self, tokens: Sequence[int], param: str) -> None:
        if (most := max(tokens, default=0)) >= self.vocab_size:
            raise ApiError(
                400,
                f"{param}: token {most} is not among the model's {self.vocab_size}",
                param=param,
                code="invalid_value",
            )

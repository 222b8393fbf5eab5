"""From the engine's tokens to pieces of text: whole characters, stop strings, log probabilities."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from infopt.core.runtime.request import FinishReason, SamplingParams, StepOutput, TokenLogprob
from infopt.core.server.tool_parser import CallPiece, Reader
from infopt.core.server.tools import ToolUse
from infopt.core.text.detokenize import Detokenizer

T = TypeVar("T")
Reason = FinishReason | Literal["tool_calls"]


class Generator(Protocol):
    """What answers a prompt with tokens; closing what it returns ends the work on it, and putting
    the index of one of several answers into `ended` the work on that."""

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, ended: Collection[int] = ()
    ) -> AsyncGenerator[StepOutput, None]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be sent, and the tokens since the last piece; the last has a finish reason."""

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: Reason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """With the first piece, where they were asked for."""
    calls: tuple[CallPiece, ...] = ()
    """Come after the text."""
    end: TokenLogprob | None = None
    """Of the token that ended the answer, which is none of its own."""


@dataclass(slots=True)
class _Answer:
    """What is known of an answer and not yet sent."""

    detokenizer: Detokenizer
    reader: Reader | None = None
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def take(self, output: StepOutput, index: int) -> Piece | None:
        """A piece, if there is something to send."""
        self.tokens += len(output.token_ids)
        self.logprobs += output.logprobs or ()
        text = self.detokenizer.push(output.token_ids)
        reason: Reason | None = output.finish_reason
        if reason is not None:
            text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            reason = "stop"
        calls: tuple[CallPiece, ...] = ()
        if self.reader is not None:
            text, calls, reason = _read(self.reader, text, reason)
        if not text and not calls and reason is None:
            return None
        told = self.prompt_logprobs
        piece = Piece(index, text, self.tokens, self.logprobs, reason, told, calls, output.end)
        self.tokens, self.logprobs, self.prompt_logprobs = 0, (), None
        return piece


def _read(
    reader: Reader, text: str, reason: Reason | None
) -> tuple[str, tuple[CallPiece, ...], Reason | None]:
    """What of a text is content and what are calls, and why the answer ends, if it does."""
    content, calls = reader.push(text)
    if reader.is_over:
        reason = "stop"
    if reason is not None:
        more, rest = reader.finish()
        content, calls = content + more, calls + rest
    return content, calls, "tool_calls" if reason == "stop" and reader.called else reason


async def pieces(
    engine: Generator,
    tokenizer: Any,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
    tools: ToolUse | None = None,
    first: int = 0,
) -> AsyncGenerator[Piece, None]:
    """The answers to one prompt, numbered from `first`; a stop string ends one of them, in the
    engine as well, and so does the one call of `tools` that is wanted."""
    answers = [
        _Answer(
            Detokenizer(
                tokenizer,
                stop=stop,
                skip_special_tokens=skip_special_tokens,
                min_tokens=params.min_tokens,
                shown=() if tools is None else tools.mark_ids.values(),
            ),
            None if tools is None else tools.reader(),
        )
        for _ in range(params.n)
    ]
    ended: set[int] = set()
    outputs = engine.generate(prompt, params, ended)
    async with aclosing(outputs):
        async for output in outputs:
            if output.prompt_logprobs is not None:
                for answer in answers:
                    answer.prompt_logprobs = output.prompt_logprobs
            piece = answers[output.index].take(output, first + output.index)
            if piece is not None:
                yield piece
                if piece.finish_reason is not None:
                    ended.add(output.index)
            if len(ended) == len(answers):
                return


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several sources bring, as it comes; a fault in one ends them all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield item
        return
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def drain(source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            told = await queue.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                left -= 1
            else:
                yield told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

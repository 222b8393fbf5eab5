"""From the engine's tokens to pieces of text: whole characters, stop strings, log probabilities."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from infopt.core.runtime.request import FinishReason, SamplingParams, StepOutput, TokenLogprob
from infopt.core.text.detokenize import Detokenizer


class Generator(Protocol):
    """What answers a prompt with tokens; closing what it returns ends the work on it."""

    def generate(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[StepOutput, None]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be sent, and the tokens since the last piece; the last has a finish reason."""

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


async def pieces(
    engine: Generator,
    tokenizer: Any,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
    index: int = 0,
) -> AsyncGenerator[Piece, None]:
    """The answer to one prompt; a stop string ends it, in the engine as well."""
    detokenizer = Detokenizer(tokenizer, stop=stop, skip_special_tokens=skip_special_tokens)
    outputs = engine.generate(prompt, params)
    tokens = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    async with aclosing(outputs):
        async for output in outputs:
            tokens += len(output.token_ids)
            logprobs += output.logprobs or ()
            text = detokenizer.push(output.token_ids)
            reason = output.finish_reason
            if reason is not None:
                text += detokenizer.finish()
            if detokenizer.stopped_by is not None:
                reason = "stop"
            if text or reason is not None:
                yield Piece(index, text, tokens, logprobs, reason)
                tokens, logprobs = 0, ()
            if reason is not None:
                return


async def merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of several answers as they come; a fault in one ends them all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for piece in source:
                yield piece
        return
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def drain(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""From the engine's tokens to pieces of text: whole characters, stop strings, log probabilities."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from infopt.core.runtime.request import FinishReason, SamplingParams, StepOutput, TokenLogprob
from infopt.core.text.detokenize import Detokenizer


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
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """With the first piece, where they were asked for."""


@dataclass(slots=True)
class _Answer:
    """What is known of an answer and not yet sent."""

    detokenizer: Detokenizer
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def take(self, output: StepOutput, index: int) -> Piece | None:
        """A piece, if there is something to send."""
        self.tokens += len(output.token_ids)
        self.logprobs += output.logprobs or ()
        text, reason = self.detokenizer.push(output.token_ids), output.finish_reason
        if reason is not None:
            text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            reason = "stop"
        if not text and reason is None:
            return None
        piece = Piece(index, text, self.tokens, self.logprobs, reason, self.prompt_logprobs)
        self.tokens, self.logprobs, self.prompt_logprobs = 0, (), None
        return piece


async def pieces(
    engine: Generator,
    tokenizer: Any,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
    first: int = 0,
) -> AsyncGenerator[Piece, None]:
    """The answers to one prompt, numbered from `first`; a stop string ends one of them, in the
    engine as well."""
    answers = [
        _Answer(
            Detokenizer(
                tokenizer,
                stop=stop,
                skip_special_tokens=skip_special_tokens,
                min_tokens=params.min_tokens,
            )
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

"""Pieces of text in the shapes of OpenAI's answers: whole, or as the chunks of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from infopt.core.runtime.request import TokenLogprob
from infopt.core.server.protocol import StreamOptions
from infopt.core.server.stream import Piece
from infopt.core.server.tool_parser import CallPiece

Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Tokens in and out, over all choices of a request."""

    prompt: int
    completion: int = 0

    def map(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Shape(Protocol):
    """One kind of answer; it may keep what it has told of each choice so far."""

    def head(self, *, streamed: bool) -> Json: ...

    def deltas(self, piece: Piece) -> list[Json]:
        """The choices of the chunks that tell this piece, a chunk each."""
        ...

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """A whole choice."""
        ...


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompts, as tokens and as texts, each to precede its `n` answers."""

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    n: int = 1


@dataclass(slots=True)
class CompletionShape:
    """/v1/completions; with `echo` the prompts precede the answers, with log probabilities too."""

    model: str
    tokenizer: Any
    logprobs: bool
    echo: Echo | None = None
    _head: Json = field(init=False)
    _offsets: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._head = _head("cmpl", self.model)

    def head(self, *, streamed: bool) -> Json:
        return {**self._head, "object": "text_completion"}

    def deltas(self, piece: Piece) -> list[Json]:
        text, told = "", None
        if piece.index not in self._offsets:
            self._offsets[piece.index] = 0
            if self.echo is not None:
                prompt = piece.index // self.echo.n
                text = self.echo.texts[prompt]
                told = self._of_prompt(piece.index, self.echo.prompts[prompt], piece)
                self._offsets[piece.index] = len(text)
        # As OpenAI and vLLM have it, the token that ended the answer is told of, if it has no text.
        ended = () if piece.end is None else (piece.end,)
        logprobs = self._logprobs(piece.index, (*piece.logprobs, *ended))
        if told is not None and logprobs is not None:
            logprobs = {key: told[key] + logprobs[key] for key in told}
        return [
            {
                "index": piece.index,
                "text": text + piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }
        ]

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        (whole,) = self.deltas(_joined(index, pieces))
        return whole

    def _of_prompt(self, index: int, prompt: Sequence[int], piece: Piece) -> Json | None:
        """Of the prompt's tokens, the first of which nothing is known about."""
        told = self._logprobs(index, piece.prompt_logprobs or ())
        if told is None:
            return None
        first = _token_text(self.tokenizer, prompt[0])
        return {
            "tokens": [first, *told["tokens"]],
            "token_logprobs": [None, *told["token_logprobs"]],
            "top_logprobs": [None, *told["top_logprobs"]],
            "text_offset": [0, *(len(first) + offset for offset in told["text_offset"])],
        }

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        tokens = [_token_text(self.tokenizer, entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; of tokens with the same text the most likely. The chosen one is always there."""
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(_token_text(self.tokenizer, token_id), logprob)
        return found


@dataclass(slots=True)
class ChatShape:
    """/v1/chat/completions; calls of tools get their ids here."""

    model: str
    tokenizer: Any
    logprobs: bool
    short_ids: bool = False
    _head: Json = field(init=False)
    _begun: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._head = _head("chatcmpl", self.model)

    def head(self, *, streamed: bool) -> Json:
        return {**self._head, "object": "chat.completion.chunk" if streamed else "chat.completion"}

    def deltas(self, piece: Piece) -> list[Json]:
        """The role first; it waits for the first token, so that no client takes it for one."""
        told: list[Json] = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            told.append(self._delta(piece.index, {"role": "assistant", "content": ""}))
        if piece.text or piece.logprobs:
            logprobs = self._logprobs(piece.logprobs)
            told.append(self._delta(piece.index, {"content": piece.text}, logprobs=logprobs))
        for call in piece.calls:
            told.append(self._delta(piece.index, {"tool_calls": [self._call(call)]}))
        if piece.finish_reason is not None:
            told.append(self._delta(piece.index, {}, reason=piece.finish_reason))
        return told

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        whole = _joined(index, pieces)
        message: Json = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message["content"] = whole.text or None
            message["tool_calls"] = calls = []
            for call in whole.calls:
                if call.name:
                    told = self._call(call)
                    del told["index"]
                    calls.append(told)
                else:
                    calls[call.index]["function"]["arguments"] += call.arguments
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(whole.logprobs),
            "finish_reason": whole.finish_reason,
        }

    def _call(self, call: CallPiece) -> Json:
        function = {"arguments": call.arguments}
        if not call.name:
            return {"index": call.index, "function": function}
        name = uuid.uuid4().hex
        call_id = name[:9] if self.short_ids else f"call_{name[:24]}"
        named = {"id": call_id, "type": "function"}
        return {"index": call.index, **named, "function": {"name": call.name, **function}}

    def _delta(
        self, index: int, delta: Json, *, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._token(*top) for top in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        text = _token_text(self.tokenizer, token_id)
        # A token that is a part of a character has no text of its own to take bytes from.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


async def chunks(
    answer: AsyncGenerator[Piece, None], shape: Shape, usage: Usage, options: StreamOptions
) -> AsyncGenerator[Json, None]:
    """The chunks of a stream; with `include_usage` the last one has the usage and no choices."""
    head = shape.head(streamed=True)
    async with aclosing(answer):
        async for piece in answer:
            usage.completion += piece.tokens
            for choice in shape.deltas(piece):
                chunk = {**head, "choices": [choice]}
                if options.continuous_usage_stats:
                    chunk["usage"] = usage.map()
                elif options.include_usage:
                    chunk["usage"] = None
                yield chunk
    if options.include_usage:
        yield {**head, "choices": [], "usage": usage.map()}


async def whole(
    answer: AsyncGenerator[Piece, None], shape: Shape, usage: Usage, count: int
) -> Json:
    """The answer in one, with its `count` choices in order."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    async with aclosing(answer):
        async for piece in answer:
            usage.completion += piece.tokens
            found[piece.index].append(piece)
    choices = [shape.choice(index, pieces) for index, pieces in enumerate(found)]
    return {**shape.head(streamed=False), "choices": choices, "usage": usage.map()}


def _head(prefix: str, model: str) -> Json:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _joined(index: int, pieces: Sequence[Piece]) -> Piece:
    return Piece(
        index,
        "".join(piece.text for piece in pieces),
        sum(piece.tokens for piece in pieces),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        pieces[-1].finish_reason,
        next((p.prompt_logprobs for p in pieces if p.prompt_logprobs is not None), None),
        tuple(call for piece in pieces for call in piece.calls),
        pieces[-1].end,
    )


def _token_text(tokenizer: Any, token_id: int) -> str:
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    return text

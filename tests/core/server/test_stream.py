import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from infopt.core.errors import EngineError
from infopt.core.runtime.request import SamplingParams, StepOutput
from infopt.core.server.stream import Piece, merged, pieces


class Scripted:
    """Answers any prompt with the given tokens, `each` at a time; knows what was closed early."""

    def __init__(self, tokens: Sequence[int], *, each: int = 1, fail_after: int | None = None):
        self.tokens, self.each, self.fail_after = tokens, each, fail_after
        self.given = 0
        self.ended: list[str] = []

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, ended: Collection[int] = ()
    ) -> AsyncGenerator[StepOutput, None]:
        over = "early"
        try:
            for start in range(0, len(self.tokens), self.each):
                await asyncio.sleep(0)
                if self.fail_after is not None and self.given >= self.fail_after:
                    raise EngineError("lost")
                group = tuple(self.tokens[start : start + self.each])
                self.given += len(group)
                last = start + self.each >= len(self.tokens)
                over = "whole" if last else over
                yield StepOutput("x", group, "length" if last else None)
        finally:
            self.ended.append(over)


def collect(engine: Scripted, tokenizer: Any, **settings: Any) -> list[Piece]:
    async def run() -> list[Piece]:
        answer = pieces(engine, tokenizer, [1], SamplingParams(), **settings)
        return [piece async for piece in answer]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def tokenizer(default_artifact: Any) -> Any:
    return default_artifact.tokenizer()


TEXT = "Grüße an 世界 🌍🚀, stop here please"


@pytest.mark.parametrize("each", [1, 2, 3, 100])
def test_characters_come_whole_and_every_token_counts(tokenizer: Any, each: int) -> None:
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) > len(TEXT.split())
    found = collect(Scripted(tokens, each=each), tokenizer)
    assert "".join(piece.text for piece in found) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in found)
    assert sum(piece.tokens for piece in found) == len(tokens)
    assert all(piece.text for piece in found[:-1]), "nothing empty is sent"
    assert [piece.finish_reason for piece in found][-1] == "length"


@pytest.mark.parametrize("each", [1, 3, 100])
def test_a_stop_string_ends_the_work(tokenizer: Any, each: int) -> None:
    engine = Scripted([*tokenizer.encode(TEXT), *range(1000, 1200)], each=each)
    found = collect(engine, tokenizer, stop=["op he"])
    assert "".join(piece.text for piece in found) == TEXT[: TEXT.index("op he")]
    assert found[-1].finish_reason == "stop"
    assert engine.ended == ["early"] and engine.given < 150


def test_merged_answers_keep_their_index(tokenizer: Any) -> None:
    texts = ["one two three", "a", "cinq six sept huit"]

    async def run() -> list[Piece]:
        sources = [
            pieces(Scripted(tokenizer.encode(t)), tokenizer, [1], SamplingParams(), first=i)
            for i, t in enumerate(texts)
        ]
        return [piece async for piece in merged(sources)]

    found = asyncio.run(run())
    assert ["".join(p.text for p in found if p.index == i) for i in range(3)] == texts


@pytest.mark.parametrize("count", [1, 3])
def test_leaving_early_closes_every_source(tokenizer: Any, count: int) -> None:
    engines = [Scripted(range(1000, 1100)) for _ in range(count)]

    async def run() -> None:
        answer = merged([pieces(e, tokenizer, [1], SamplingParams()) for e in engines])
        async with aclosing(answer):
            async for _ in answer:
                if all(engine.given for engine in engines):
                    return

    asyncio.run(run())
    assert [engine.ended for engine in engines] == [["early"]] * count


def test_a_fault_in_one_ends_all(tokenizer: Any) -> None:
    engines = [Scripted(range(1000, 1100)), Scripted(range(1000, 1100), fail_after=3)]

    async def run() -> None:
        async for _ in merged([pieces(e, tokenizer, [1], SamplingParams()) for e in engines]):
            pass

    with pytest.raises(EngineError, match="lost"):
        asyncio.run(run())
    assert engines[0].ended == ["early"] and engines[0].given < 20


class Several:
    """Answers with several scripts at once, a token of each in turn; heeds what is ended."""

    def __init__(self, scripts: Sequence[Sequence[int]]) -> None:
        self.scripts = scripts
        self.given = [0] * len(scripts)

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, ended: Collection[int] = ()
    ) -> AsyncGenerator[StepOutput, None]:
        for place in range(max(map(len, self.scripts))):
            for index, script in enumerate(self.scripts):
                if place < len(script) and index not in ended:
                    self.given[index] += 1
                    reason = "length" if place == len(script) - 1 else None
                    yield StepOutput("x", (script[place],), reason, index=index)  # type: ignore[arg-type]


def test_a_stop_string_ends_one_of_several_answers(tokenizer: Any) -> None:
    scripts = [tokenizer.encode(text) for text in (TEXT + TEXT, "one two three four", TEXT + TEXT)]
    engine = Several(scripts)

    async def run() -> list[Piece]:
        params = SamplingParams(n=3)
        answer = pieces(engine, tokenizer, [1], params, stop=["op he", "three"], first=6)
        return [piece async for piece in answer]

    found = asyncio.run(run())
    texts = {n: "".join(p.text for p in found if p.index == n) for n in (6, 7, 8)}
    assert texts == {6: TEXT[: TEXT.index("op he")], 7: "one two ", 8: TEXT[: TEXT.index("op he")]}
    assert [p.finish_reason for p in found if p.finish_reason] == ["stop"] * 3
    assert engine.given[1] < len(scripts[1]) and engine.given[0] < len(scripts[0])


def test_no_stop_string_is_looked_for_in_the_first_tokens(tokenizer: Any) -> None:
    tokens = tokenizer.encode("stop one stop two stop three")
    for each in (1, 2, 100):

        async def run(each: int = each) -> list[Piece]:
            params = SamplingParams(max_tokens=None, min_tokens=3)
            engine = Scripted(tokens, each=each)
            answer = pieces(engine, tokenizer, [1], params, stop=["stop"])
            return [piece async for piece in answer]

        text = "".join(piece.text for piece in asyncio.run(run()))
        assert text == tokenizer.decode(tokens[:3]) + " two "

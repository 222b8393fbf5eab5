"""The requests of a load, one after the other without end: what each workload asks."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from infopt.core.bench.client import Request, Session
from infopt.core.bench.dataset import read_dataset
from infopt.core.bench.structured import ANSWER_FORMAT, CHOICES, TOOLS, question
from infopt.core.bench.trace import TraceRow
from infopt.core.bench.workload import joined, random_prompt
from infopt.core.recipe.bench import BenchSettings

PREFIX_TOKENS, TURNS = 512, 3
DOCUMENTS, DOCUMENT_TOKENS = 64, 256
"""Of retrieval: how many documents there are to be found, and how long one is."""


def sessions(settings: BenchSettings, vocab_size: int | None) -> Iterator[Session]:
    """Conversations without end, each a function of the seed and its place alone.

    `vocab_size` None: prompts are text, as through chat. Raises UsageError for a dataset that
    cannot be read.
    """
    if settings.workload == "file":
        assert settings.dataset is not None, "checked by the settings"
        entries = read_dataset(Path(settings.dataset), chat=settings.chat)
        for index in itertools.count():
            entry = entries[index % len(entries)]
            tokens = entry.output_tokens or _lengths(settings, index)[1]
            yield (Request(entry.prompt, tokens, entry.messages),)
    for index in itertools.count():
        yield _session(settings, index, vocab_size)


def traced(rows: Sequence[TraceRow], seed: int, vocab_size: int | None) -> Iterator[Session]:
    """A request of each row's lengths."""
    for index, row in enumerate(rows):
        prompt = random_prompt(f"{seed}/{index}", row.prompt_tokens, vocab_size)
        yield (Request(prompt, row.output_tokens),)


def longest(settings: BenchSettings) -> tuple[int, int] | None:
    """The most prompt and output tokens that one request can hold; None where a file decides."""
    if settings.workload == "file" or settings.trace is not None:
        return None
    prompt, output = settings.prompt_range[1], settings.output_range[1]
    if settings.workload == "shared-prefix":
        prompt += settings.prefix_tokens or PREFIX_TOKENS
    if settings.workload == "multi-turn":
        turns = settings.turns or TURNS
        prompt += (turns - 1) * (prompt + output)
    return prompt, output


def _session(settings: BenchSettings, index: int, vocab_size: int | None) -> Session:
    seed = f"{settings.seed}/{index}"
    prompt_tokens, output_tokens = _lengths(settings, index)
    own = random_prompt(seed, prompt_tokens, vocab_size)
    match settings.workload:
        case "shared-prefix":
            which = random.Random(f"{seed}/prefix").randrange(settings.prefixes or 1)
            length = settings.prefix_tokens or PREFIX_TOKENS
            prefix = random_prompt(f"{settings.seed}/prefix/{which}", length, vocab_size)
            return (Request(joined(prefix, own), output_tokens),)
        case "rag":
            prompt = _retrieved(settings, index, prompt_tokens, vocab_size)
            return (Request(prompt, output_tokens),)
        case "multi-turn":
            return _conversation(settings, index)
        case "json":
            asked = question(str(own), "Describe it as JSON.")
            return (Request("", output_tokens, asked, {"response_format": ANSWER_FORMAT}),)
        case "tools":
            asked = question(str(own), "What is the weather in Paris, and what time is it there?")
            choice = CHOICES[index % len(CHOICES)]
            return (Request("", output_tokens, asked, {"tools": TOOLS, "tool_choice": choice}),)
    return (Request(own, output_tokens),)


def _lengths(settings: BenchSettings, index: int) -> tuple[int, int]:
    """Of prompt and output, each uniform in its range."""
    rng = random.Random(f"{settings.seed}/{index}/lengths")
    return rng.randint(*settings.prompt_range), rng.randint(*settings.output_range)


def _conversation(settings: BenchSettings, index: int) -> Session:
    turns = []
    for turn in range(settings.turns or TURNS):
        rng = random.Random(f"{settings.seed}/{index}/{turn}/lengths")
        said = random_prompt(
            f"{settings.seed}/{index}/{turn}", rng.randint(*settings.prompt_range), None
        )
        message = {"role": "user", "content": said}
        turns.append(Request("", rng.randint(*settings.output_range), (message,)))
    return tuple(turns)


def _retrieved(
    settings: BenchSettings, index: int, tokens: int, vocab_size: int | None
) -> tuple[int, ...] | str:
    """Documents out of one collection, then a question of this request's own, `tokens` in all."""
    seed = f"{settings.seed}/{index}"
    count = min((tokens - 1) // DOCUMENT_TOKENS, DOCUMENTS)
    found = random.Random(f"{seed}/found").sample(range(DOCUMENTS), count)
    documents = [
        random_prompt(f"{settings.seed}/document/{n}", DOCUMENT_TOKENS, vocab_size) for n in found
    ]
    rest = tokens - count * DOCUMENT_TOKENS
    return joined(*documents, random_prompt(f"{seed}/question", rest, vocab_size))

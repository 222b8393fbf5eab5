"""Synthetic prompts: seeded, each different, so that no prefix cache flatters."""

import random

from infopt.core.bench.client import Request

# Short common words: about one token each in every tokenizer, so that no tokenizer is needed here.
_COMMON = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work number night
    point home water room mother area money story fact month lot right study book eye job word
    business issue side kind head house service friend father power hour game line end member law
    car city name team minute idea body back parent face others level office door health person
    art war history party result change morning reason research girl guy moment air teacher force
    """
WORDS = tuple(_COMMON.split())


Prompt = tuple[int, ...] | str


def synthetic(
    count: int, prompt_tokens: int, output_tokens: int, *, seed: int, vocab_size: int | None
) -> list[Request]:
    """`count` requests of `prompt_tokens` uniform token ids, or words where ids cannot be sent."""
    return [
        Request(random_prompt(f"{seed}/{index}", prompt_tokens, vocab_size), output_tokens)
        for index in range(count)
    ]


def random_prompt(seed: str, tokens: int, vocab_size: int | None) -> Prompt:
    """Uniform token ids below `vocab_size`, or as many words where there is none."""
    rng = random.Random(seed)
    if vocab_size is None:
        return " ".join(rng.choices(WORDS, k=tokens))
    return tuple(rng.choices(range(vocab_size), k=tokens))


def joined(*parts: Prompt) -> Prompt:
    """One prompt after the other; all are ids, or all are text."""
    if isinstance(parts[0], str):
        return " ".join(str(part) for part in parts)
    return tuple(token for part in parts for token in part if isinstance(token, int))

"""Log probabilities of the prompt are those of transformers, however it is run."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.layers.embedding import Embedding
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams, StepOutput, TokenLogprob

MakeEngine = Callable[..., Engine]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def scored(n: int = 1, count: int = 2) -> SamplingParams:
    return SamplingParams(8, temperature=0, ignore_eos=True, prompt_logprobs=count, n=n)


def finish(engine: Engine) -> dict[tuple[str, int], list[StepOutput]]:
    made: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            made.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return made


def check(found: Sequence[TokenLogprob] | None, prompt: list[int], model: Any) -> None:
    assert found is not None and len(found) == len(prompt) - 1
    if len(prompt) == 1:
        return
    wanted = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    values, tokens = wanted.topk(2)
    for place, entry in enumerate(found):
        assert entry.token_id == prompt[place + 1]
        assert entry.logprob == pytest.approx(float(wanted[place, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == tokens[place].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values[place].tolist(), abs=1e-4)


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_they_are_transformers(
    make_engine: MakeEngine,
    tiny_reference: tuple[Artifact, Any],
    budget: int,
    tight: bool,
    n: int,
) -> None:
    """Chunked, preempted, and once more when every block is known already."""
    engine = make_engine(max_batch_tokens=budget, kv_blocks=13 if tight else 64)
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 4, 5, 16, 31, 40)]
    for _ in range(2):
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, scored(n))
        made = finish(engine)
        for index, prompt in enumerate(prompts):
            for answer in range(n):
                first, *rest = made[str(index), answer]
                assert all(output.prompt_logprobs is None for output in rest)
                if answer:
                    assert first.prompt_logprobs is None, "told once"
                else:
                    check(first.prompt_logprobs, prompt, tiny_reference[1])
    assert (engine.stats().preemptions > 0) is tight


def test_a_prompt_that_is_scored_is_computed_and_others_still_find_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    prompt = prompt_of(33)
    engine.add("a", prompt, scored())
    finish(engine)
    engine.add("b", prompt, scored())
    finish(engine)
    assert engine.stats().prefix_hits == 0
    engine.add("c", prompt, SamplingParams(3, temperature=0, ignore_eos=True))
    made = finish(engine)
    assert engine.stats().prefix_hits == 32
    assert all(output.prompt_logprobs is None for output in made["c", 0])


def test_a_fault_in_the_prompt_ends_that_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    runner = engine._runner
    table = runner.decoder.embedding.weight.clone()
    table[7] = torch.nan
    # Untied: in the head, the row would spoil every request.
    runner.decoder = replace(runner.decoder, embedding=Embedding(table))
    engine.add("bad", [5, 7, 6, 8], scored())
    engine.add("good", [5, 6, 8], scored())
    made = finish(engine)
    (output,) = made["bad", 0]
    # The token before it may be spoiled too, by a masked product of nothing and NaN.
    assert output.finish_reason == "error" and output.error is not None
    assert re.match("the logits after token [12] are not finite", output.error)
    assert len(made["good", 0]) == 8
    assert engine.stats().blocks_used == 0


def test_an_answer_that_ends_at_once_tells_them_too(
    make_engine: MakeEngine, tiny_reference: tuple[Artifact, Any]
) -> None:
    engine = make_engine()
    params = SamplingParams(5, temperature=0, prompt_logprobs=2, stop_token_ids=tuple(range(97)))
    engine.add("x", prompt_of(9), params)
    (output,) = finish(engine)["x", 0]
    assert output.finish_reason == "stop" and output.token_ids == ()
    check(output.prompt_logprobs, prompt_of(9), tiny_reference[1])

"""Beams on the engine against transformers' beam search, however they are run."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams, StepOutput

MakeEngine = Callable[..., Engine]
EOS = (5, 17, 40)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


# None of these has two answers whose scores differ by a rounding, as the first with seed 1 does.
PROMPTS = [prompt_of(n, seed=n + 20) for n in (1, 4, 7, 16, 21)]


def searched(
    model: Any, prompt: list[int], params: SamplingParams, eos: tuple[int, ...]
) -> list[list[int]]:
    """What transformers answers, without end tokens."""
    assert params.max_tokens is not None
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=96,
    )
    rows = [row[len(prompt) :].tolist() for row in made]
    return [list(itertools.takewhile(lambda t: t not in (*eos, 96), row)) for row in rows]


def finish(engine: Engine) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    for _ in range(5000):
        if not engine.has_work():
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert not engine.has_work() and engine.stats().blocks_used == 0
    return outputs


def beams(width: int, n: int = 1, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=10, temperature=0, beam_width=width, n=n, **values)


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -0.5])
@pytest.mark.parametrize("eos", [(), EOS], ids=["no end", "three ends"])
def test_answers_are_those_of_transformers(
    make_engine: MakeEngine,
    tiny_reference: tuple[Artifact, Any],
    early: Any,
    penalty: float,
    eos: tuple[int, ...],
) -> None:
    engine = make_engine()
    engine.eos_token_ids = frozenset(eos)
    for width, n in ((2, 2), (5, 3)):
        params = beams(width, n, length_penalty=penalty, early_stopping=early)
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, params)
        made = finish(engine)
        for index, prompt in enumerate(PROMPTS):
            outputs = made[str(index)]
            assert [output.index for output in outputs] == list(range(n))
            found = [list(output.token_ids) for output in outputs]
            assert found == searched(tiny_reference[1], prompt, params, eos), (width, index)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 1, "kv_blocks": 200},
        {"block_size": 9},
        {"max_batch_tokens": 3},
        {"max_running": 2},
        {"max_running": 1, "prefix_caching": False},
        {"kv_blocks": 8},
        {"kv_blocks": 8, "prefix_caching": False, "max_batch_tokens": 5},
        {"block_size": 1, "kv_blocks": 32, "prefix_host_bytes": 10_000},
        {"batching": "static", "max_running": 3},
        {"batching": "dynamic", "max_running": 6, "batch_wait_ms": 1.0},
    ],
    ids=str,
)
def test_however_they_are_run_they_find_the_same(
    make_engine: MakeEngine, changes: dict[str, Any]
) -> None:
    """Beams of several requests and greedy ones between them, in pools that do not hold them."""
    plenty, crowded = make_engine(kv_blocks=256, prefix_caching=False), make_engine(**changes)
    for engine in (plenty, crowded):
        engine.eos_token_ids = frozenset(EOS)
    wanted = {}
    jobs = {f"{i}": (prompt, beams(4, 4)) for i, prompt in enumerate(PROMPTS)}
    jobs |= {f"greedy {i}": (prompt, beams(1)) for i, prompt in enumerate(PROMPTS[:2])}
    for name, job in jobs.items():
        plenty.add(name, *job)
        wanted |= finish(plenty)
    for name, job in jobs.items():
        crowded.add(name, *job)
    assert finish(crowded) == wanted
    if changes.get("kv_blocks") in (8, 32) or "max_running" in changes:
        assert crowded.stats().preemptions > 0, "this case is here to preempt"


def test_beams_share_the_blocks_of_what_they_have_in_common(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(18, seed=0), beams(4))
    engine.step()
    assert engine.stats().running == 4 and engine.stats().blocks_used == 5
    engine.step()
    assert engine.stats().blocks_used <= 4 + 4


def test_beams_end_together(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(6, seed=0), beams(4, 2))
    engine.step()
    engine.abort("x")
    assert engine.stats().blocks_used == 0
    said = [(o.index, o.finish_reason) for o in engine.step()]
    assert said == [(0, "abort"), (1, "abort")] and not engine.has_work()


def test_logits_that_are_not_finite_end_the_search(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._runner.decoder.embedding.weight[3] = torch.nan
    engine.add("bad", [1, 3], beams(3, 2))
    engine.add("good", [1, 2], beams(3, 2))
    made = finish(engine)
    assert [(o.index, o.finish_reason) for o in made["bad"]] == [(0, "error"), (1, "error")]
    assert "not finite" in str(made["bad"][0].error)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 2, "n": 3, "temperature": 0}, "more than the 2"),
        ({"beam_width": 2}, "temperature must be 0"),
        ({"beam_width": 2, "temperature": 0, "top_k": 5}, "top_k does nothing with"),
        ({"beam_width": 2, "temperature": 0, "seed": 5}, "seed does nothing with"),
        ({"beam_width": 2, "temperature": 0, "stop": ("a",)}, "stop does nothing with"),
        ({"beam_width": 2, "temperature": 0, "logprobs": 1}, "logprobs does nothing with"),
        ({"length_penalty": 2.0}, "length_penalty does nothing without"),
        ({"early_stopping": True}, "early_stopping does nothing without"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"length_penalty": float("inf")}, "length_penalty"),
        ({"length_penalty": 1e308}, "length_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
    ],
    ids=str,
)
def test_what_beams_would_not_read_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SamplingParams(**values)

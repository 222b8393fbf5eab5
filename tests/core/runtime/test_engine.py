from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infopt.core.artifact.read import Artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.limits import read_eos_token_ids
from infopt.core.runtime.request import SamplingParams, StepOutput

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def finish(engine: Engine) -> dict[str, list[StepOutput]]:
    """Step to the end; every step leaves the blocks in order."""
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.stats().blocks_used == 0
    return outputs


def tokens_of(outputs: Sequence[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def generate(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams
) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, params)
    outputs = finish(engine)
    return [tokens_of(outputs[str(index)]) for index in range(len(prompts))]


@pytest.fixture(scope="module")
def wanted(tiny_reference: tuple[Artifact, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts at the edges of blocks, and what transformers makes of them."""
    prompts = [prompt_of(n, seed=n) for n in (1, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 40)]
    model = tiny_reference[1]
    found = [
        model.generate(
            torch.tensor([p]),
            attention_mask=torch.ones(1, len(p)),
            do_sample=False,
            max_new_tokens=8,
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    return prompts, found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 1, "kv_blocks": 64},
        {"block_size": 16, "kv_blocks": 64},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 5},
        {"max_batch_tokens": 13, "max_running": 3},
        {"kv_blocks": 13},
        {"block_size": 1, "kv_blocks": 50, "max_batch_tokens": 7},
    ],
    ids=str,
)
def test_greedy_equals_transformers_however_it_is_scheduled(
    make_engine: MakeEngine,
    wanted: tuple[list[list[int]], list[list[int]]],
    changes: dict[str, int],
) -> None:
    prompts, found = wanted
    engine = make_engine(**changes)
    assert generate(engine, prompts, GREEDY) == found
    if changes.get("kv_blocks") in (13, 50):
        assert engine.stats().preemptions > 0, "this case is here to preempt"


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    spare=st.integers(0, 6),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_request_does_not_depend_on_its_neighbours(
    make_engine: MakeEngine, lengths: list[int], block_size: int, budget: int, spare: int
) -> None:
    """Sampled tokens, each request with its seed: alone with plenty, and crowded together."""
    prompts = [prompt_of(n, seed=i) for i, n in enumerate(lengths)]
    params = [
        SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=i)
        for i in range(len(prompts))
    ]
    alone = make_engine()
    needed = -(-(max(lengths) + 6) // block_size)
    crowded = make_engine(block_size=block_size, max_batch_tokens=budget, kv_blocks=needed + spare)
    singly = []
    for index, prompt in enumerate(prompts):
        alone.add("x", prompt, params[index])
        singly.append(tokens_of(finish(alone)["x"]))
        crowded.add(str(index), prompt, params[index])
    outputs = finish(crowded)
    assert [tokens_of(outputs[str(i)]) for i in range(len(prompts))] == singly


def test_the_last_output_says_why(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(3), SamplingParams(max_tokens=2, temperature=0))
    outputs = finish(engine)["x"]
    assert [output.finish_reason for output in outputs] == [None, "length"]
    assert [len(output.token_ids) for output in outputs] == [1, 1]


def test_stop_tokens_end_a_request_and_are_left_out(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = generate(engine, [prompt_of(5)], GREEDY)[0]
    at = next(i for i in range(1, 8) if free[i] not in free[:i])
    engine.add("x", prompt_of(5), SamplingParams(temperature=0, stop_token_ids=(free[at],)))
    outputs = finish(engine)["x"]
    assert tokens_of(outputs) == free[:at]
    assert outputs[-1].finish_reason == "stop" and outputs[-1].token_ids == ()


def test_end_of_sequence_stops_unless_ignored(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = generate(engine, [prompt_of(5)], GREEDY)[0]
    engine.eos_token_ids = frozenset({free[0]})
    engine.add("heeds", prompt_of(5), SamplingParams(temperature=0))
    engine.add("ignores", prompt_of(5), GREEDY)
    outputs = finish(engine)
    assert tokens_of(outputs["heeds"]) == [] and outputs["heeds"][-1].finish_reason == "stop"
    assert tokens_of(outputs["ignores"]) == free


def test_no_limit_means_the_longest_sequence(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=20)
    engine.add("x", prompt_of(7), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(tokens_of(finish(engine)["x"])) == 13


def test_abort_frees_blocks_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running=1)
    engine.add("running", prompt_of(9), GREEDY)
    engine.add("waiting", prompt_of(9), GREEDY)
    engine.step()
    engine.abort("running")
    engine.abort("waiting")
    engine.abort("never was")
    assert engine.stats().blocks_used == 0 and engine.has_work()
    assert {(o.request_id, o.finish_reason) for o in engine.step()} == {
        ("running", "abort"), ("waiting", "abort")
    }  # fmt: skip
    assert not engine.has_work() and engine.step() == []


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], SamplingParams(), "empty"),
        ([97], SamplingParams(), "not among"),
        ([-1], SamplingParams(), "not among"),
        ([1] * 64, SamplingParams(max_tokens=None), "64 prompt tokens"),
        ([1] * 60, SamplingParams(max_tokens=5), "5 new ones"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    make_engine: MakeEngine, prompt: list[int], params: SamplingParams, said: str
) -> None:
    engine = make_engine()
    with pytest.raises(UsageError, match=said):
        engine.add("x", prompt, params)
    assert not engine.has_work()


def test_what_the_pool_can_never_hold_is_refused_and_the_most_it_holds_runs(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(block_size=4, kv_blocks=3)
    assert engine.max_model_len == 12
    with pytest.raises(UsageError, match="holds 12"):
        engine.add("x", prompt_of(6), SamplingParams(max_tokens=7))
    engine.add("x", prompt_of(6), SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    assert len(tokens_of(finish(engine)["x"])) == 6


def test_an_id_in_use_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(2), GREEDY)
    with pytest.raises(UsageError, match="'x'"):
        engine.add("x", prompt_of(2), GREEDY)


def test_unseeded_requests_follow_the_seed_of_the_engine(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    runs = [generate(make_engine(seed=s), [prompt_of(4)] * 2, params) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_logits_that_are_not_finite_end_that_request_alone(make_engine: MakeEngine) -> None:
    """One token's embedding is NaN: its request fails, others go on, and on its blocks later."""
    engine = make_engine(kv_blocks=8)
    good = generate(engine, [prompt_of(9, seed=1)], GREEDY)[0]
    poison = next(t for t in range(97) if t not in prompt_of(9, seed=1) + good)
    engine._runner.decoder.embedding.weight[poison] = torch.nan
    for round in range(3):
        engine.add(f"bad {round}", [*prompt_of(6, seed=1)[:2], poison], GREEDY)
        engine.add(f"good {round}", prompt_of(9, seed=1), GREEDY)
        outputs = finish(engine)
        assert tokens_of(outputs[f"good {round}"]) == good
        (failed,) = outputs[f"bad {round}"]
        assert failed.finish_reason == "error"
        assert failed.error == (
            "the logits after token 3 are not finite: model.embed_tokens is the first that is not"
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_answers_are_equal_to_the_last_bit(
    make_engine: MakeEngine, dtype: str
) -> None:
    """Log probabilities of every token, of prompts too, alone and crowded, chunked, preempted."""
    prompts = [prompt_of(n, seed=n) for n in (1, 5, 17, 30)]
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )

    def made(engine: Engine, some: Sequence[list[int]]) -> list[list[float]]:
        for index, prompt in enumerate(some):
            engine.add(str(index), prompt, params)
        outputs = finish(engine)
        found = [
            [
                each.logprob
                for output in outputs[str(n)]
                for each in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))
            ]
            for n in range(len(some))
        ]
        assert [len(values) for values in found] == [len(prompt) - 1 + 8 for prompt in some]
        return found

    settings = {"dtype": dtype, "deterministic": True}
    wanted = [made(make_engine(**settings), [prompt])[0] for prompt in prompts]
    for changes in ({}, {"max_batch_tokens": 7}, {"kv_blocks": 12}, {"block_size": 16}):
        assert made(make_engine(**settings, **changes), prompts) == wanted, changes


def test_logprobs_come_with_each_token(
    make_engine: MakeEngine, tiny_reference: tuple[Artifact, Any]
) -> None:
    engine = make_engine()
    prompt = prompt_of(5)
    engine.add(
        "x", prompt, SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True)
    )
    outputs = finish(engine)["x"]
    tokens = tokens_of(outputs)
    logits = tiny_reference[1](torch.tensor([prompt + tokens])).logits[0, 4:-1]
    wanted = logits.log_softmax(-1)
    for row, output in enumerate(outputs):
        assert output.logprobs is not None
        (found,) = output.logprobs
        assert found.logprob == pytest.approx(float(wanted[row, tokens[row]]), abs=1e-4)
        assert len(found.top) == 2 and found.top[0][0] == tokens[row]


def test_limits_that_cannot_be_met_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(UsageError, match="64 positions"):
        make_engine(max_model_len=65)
    with pytest.raises(ResourceError, match="does not fit"):
        make_engine(max_model_len=64, kv_blocks=3)


def test_a_sliding_window_does_not_bound_the_length(tiny_reference: tuple[Artifact, Any]) -> None:
    artifact = tiny_reference[0]
    changes = {"architectures": ["MistralForCausalLM"], "sliding_window": 16}
    windowed = Artifact(**{**vars(artifact), "config": {**artifact.config, **changes}})
    assert Engine.load(windowed, EngineSettings(kv_blocks=32)).max_model_len == 64


def test_end_of_sequence_tokens_of_the_generation_config_come_first(
    tiny_reference: tuple[Artifact, Any], tmp_path: Any
) -> None:
    parts = vars(tiny_reference[0])
    config = {**parts["config"], "eos_token_id": 5}
    artifact = Artifact(**{**parts, "config": config, "path": tmp_path})
    assert read_eos_token_ids(artifact) == {5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_eos_token_ids(artifact) == {7, 9}


def test_an_answer_that_nothing_can_continue_fails_alone(make_engine: MakeEngine) -> None:
    """Every token would end it, and nothing may end it yet."""
    engine = make_engine()
    stuck = SamplingParams(8, min_tokens=4, stop_token_ids=tuple(range(97)))
    engine.add("stuck", [1, 2], stuck)
    engine.add("fine", [1, 2], SamplingParams(3, temperature=0, ignore_eos=True))
    made: dict[str, list[Any]] = {"stuck": [], "fine": []}
    while engine.has_work():
        for output in engine.step():
            made[output.request_id].append(output)
    (failed,) = made["stuck"]
    assert failed.finish_reason == "error" and "no token may come next" in failed.error
    assert made["fine"][-1].finish_reason == "length" and engine.stats().blocks_used == 0


def test_a_stop_token_beyond_the_vocabulary(make_engine: MakeEngine) -> None:
    with pytest.raises(UsageError, match="stop_token_ids has a token that is not among"):
        make_engine().add("x", [1], SamplingParams(stop_token_ids=(97,), min_tokens=1))

"""Embeddings are the pooled last hidden states of transformers, however they are scheduled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import UsageError
from infopt.core.layers.embedding import Embedding
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams, StepOutput

MakeEngine = Callable[..., Engine]
MEAN, LAST = SamplingParams(pooling="mean"), SamplingParams(pooling="last")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LENGTHS = (1, 3, 4, 5, 8, 9, 16, 31, 32, 40)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def pooled(model: Any, prompt: list[int], params: SamplingParams) -> Tensor:
    """What it has to be."""
    states = model.base_model(torch.tensor([prompt])).last_hidden_state[0].double()
    found = states.mean(0) if params.pooling == "mean" else states[-1]
    return torch.nn.functional.normalize(found, dim=0).float()


def finish(engine: Engine) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.stats().blocks_used == 0
    return outputs


def embed(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> Tensor:
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, params)
    outputs = finish(engine)
    found = []
    for index in range(len(prompts)):
        (output,) = outputs[str(index)]
        assert output.finish_reason == "stop" and output.token_ids == () and output.embedding
        found.append(output.embedding)
    return torch.tensor(found)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", [MEAN, LAST], ids=["mean", "last"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 1, "kv_blocks": 64},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 13, "max_running": 3},
        {"kv_blocks": 10, "watermark": 0.0},
        {"prefix_caching": False, "max_chunk_tokens": 3},
        {"batching": "static", "max_running": 4},
        {"deterministic": True, "max_batch_tokens": 7},
    ],
    ids=str,
)
def test_they_are_those_of_transformers_however_scheduled(
    make_engine: MakeEngine,
    tiny_reference: tuple[Artifact, Any],
    changes: dict[str, Any],
    params: SamplingParams,
) -> None:
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    wanted = torch.stack([pooled(tiny_reference[1], prompt, params) for prompt in prompts])
    found = embed(make_engine(**changes), prompts, params)
    close(found, wanted)
    close(found.norm(dim=1), torch.ones(len(prompts)))


SIZES: dict[str, Any] = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": None}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)
    ),
    # Projected to the size of its embeddings; and its norms follow what they belong to.
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            do_layer_norm_before=False,
            pad_token_id=None,
            **SIZES,
        )
    ),
    # A window, and norms with an offset.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=64,
            pad_token_id=None,
            attn_implementation="eager",
            **SIZES,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    values: Any = {"dtype": "float32", "device": "cpu", "block_size": 4, "kv_blocks": 32}
    engine = Engine.load(read_artifact(tmp_path), EngineSettings(max_batch_tokens=11, **values))
    prompts = [prompt_of(n, seed=n) for n in (2, 9, 30)]
    for params in (MEAN, LAST):
        close(
            embed(engine, prompts, params),
            torch.stack([pooled(model, prompt, params) for prompt in prompts]),
        )


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from([MEAN, LAST, GREEDY]), min_size=6, max_size=6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    spare=st.integers(0, 6),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_they_neither_depend_on_neighbours_nor_disturb_them(
    make_engine: MakeEngine,
    lengths: list[int],
    kinds: list[SamplingParams],
    block_size: int,
    budget: int,
    spare: int,
) -> None:
    prompts = [prompt_of(n, seed=i) for i, n in enumerate(lengths)]
    alone = make_engine()
    needed = -(-(max(lengths) + 8) // block_size)
    crowded = make_engine(block_size=block_size, max_batch_tokens=budget, kv_blocks=needed + spare)
    singly = []
    for index, prompt in enumerate(prompts):
        alone.add("x", prompt, kinds[index])
        singly.append(finish(alone)["x"])
        crowded.add(str(index), prompt, kinds[index])
    together = finish(crowded)
    for index, one in enumerate(singly):
        other = together[str(index)]
        assert [o.token_ids for o in other] == [o.token_ids for o in one]
        if one[-1].embedding is not None:
            assert other[-1].embedding is not None
            close(torch.tensor(other[-1].embedding), torch.tensor(one[-1].embedding))


def test_prefixes_are_shared_where_that_loses_nothing(
    make_engine: MakeEngine, tiny_reference: tuple[Artifact, Any]
) -> None:
    engine, prompt = make_engine(), prompt_of(18)

    def hits(params: SamplingParams) -> int:
        before = engine.stats().prefix_hits
        engine.add("x", prompt, params)
        output = finish(engine)["x"][-1]
        if output.embedding is not None:
            close(torch.tensor(output.embedding), pooled(tiny_reference[1], prompt, params))
        return engine.stats().prefix_hits - before

    assert hits(MEAN) == 0
    assert hits(GREEDY) == hits(LAST) == 16, "its blocks are found by others"
    assert hits(MEAN) == 0, "all of its states are wanted"
    assert hits(replace(LAST, cache_salt="other")) == 0


def test_preempted_it_goes_on_where_it_was(
    make_engine: MakeEngine, tiny_reference: tuple[Artifact, Any]
) -> None:
    engine = make_engine(kv_blocks=11, max_batch_tokens=8, max_chunk_tokens=6, watermark=0.0)
    long = prompt_of(40)
    engine.add("long", long, MEAN)
    engine.step()
    engine.step()
    engine.add("urgent", prompt_of(8, seed=1), replace(GREEDY, priority=-1))
    outputs = finish(engine)
    assert engine.stats().preemptions == 1
    close(torch.tensor(outputs["long"][-1].embedding), pooled(tiny_reference[1], long, MEAN))


def test_no_logits_are_computed_for_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rows = make_engine(), list[int]()
    logits = engine._runner.decoder.logits

    def counted(hidden: Tensor, of: Tensor | None = None) -> Tensor:
        chosen = hidden if of is None else hidden[of]
        rows.append(len(chosen))
        return logits(chosen)

    monkeypatch.setattr(engine._runner, "logits", counted)
    embed(engine, [prompt_of(5), prompt_of(1)], MEAN)
    assert sum(rows) == 0
    engine.add("beside", prompt_of(5), GREEDY)
    embed(engine, [prompt_of(1), prompt_of(5)], LAST)
    # A step that is replayed computes its one request's.
    assert sum(rows) + engine.stats().replayed == 8


def test_aborted_it_frees_its_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=6)
    engine.add("x", prompt_of(40), MEAN)
    engine.step()
    assert engine.stats().blocks_used > 0
    engine.abort("x")
    assert engine.stats().blocks_used == 0
    assert [o.finish_reason for o in engine.step()] == ["abort"] and not engine.has_work()


def test_states_that_are_not_finite_are_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=1)
    (sound,) = embed(engine, [[1, 2, 3, 4, 5]], MEAN)
    table = engine._runner.decoder.embedding.weight.clone()
    table[50] = torch.nan
    engine._runner.decoder = replace(engine._runner.decoder, embedding=Embedding(table))
    engine.add("bad", [1, 2, 3, 4, 5, 50, 6], MEAN)
    engine.add("good", [1, 2, 3, 4, 5], MEAN)
    outputs = finish(engine)
    (bad,) = outputs["bad"]
    assert bad.finish_reason == "error" and bad.embedding is None
    assert bad.error is not None and "after token 6 are not finite: " in bad.error
    close(torch.tensor(outputs["good"][0].embedding), sound)


def test_a_prompt_may_be_as_long_as_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert len(embed(engine, [prompt_of(64)], MEAN)) == 1
    with pytest.raises(UsageError, match="65 prompt tokens do not fit"):
        engine.add("x", prompt_of(65), MEAN)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pooling": "max"}, "pooling must be mean or last"),
        ({"temperature": 0.5}, "temperature does nothing with pooling"),
        ({"n": 2}, "n does nothing with pooling"),
        ({"prompt_logprobs": 1}, "prompt_logprobs does nothing"),
    ],
)
def test_what_would_not_be_read_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SamplingParams(**{"pooling": "mean", **values})

"""The engine on a cache of 8 bits: near the one of full width, and the same whoever runs along."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.kv_cache import cache_dtype
from infopt.core.runtime.request import SamplingParams

FIXTURE = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "ct-kv-fp8"
WORDS = ("int8", "fp8")
PROMPTS = [[(7 * n + 11 * p) % 97 for n in range(3 + 9 * p)] for p in range(5)]
# Of log probabilities on a tiny random model.
OFF = {"int8": 0.02, "fp8": 0.12}


def generated(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log probabilities."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=1)
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, params)
    found: dict[str, tuple[list[int], list[float]]] = {}
    while engine.has_work():
        for output in engine.step():
            tokens, logprobs = found.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            logprobs += [each.logprob for each in output.logprobs or ()]
    return [found[str(index)] for index in range(len(prompts))]


@pytest.mark.parametrize("word", WORDS)
def test_answers_stay_near_those_of_full_width(
    make_engine: Callable[..., Engine], word: str
) -> None:
    wide, narrow = generated(make_engine(), PROMPTS), generated(make_engine(kv_dtype=word), PROMPTS)
    first = [abs(a[1][0] - b[1][0]) for a, b in zip(wide, narrow, strict=True)]
    assert 0 < max(first) < OFF[word]
    same = sum(a[0][0] == b[0][0] for a, b in zip(wide, narrow, strict=True))
    assert same >= len(PROMPTS) - 1


@pytest.mark.parametrize("word", WORDS)
def test_answers_do_not_depend_on_the_batch(make_engine: Callable[..., Engine], word: str) -> None:
    together = generated(make_engine(kv_dtype=word), PROMPTS)
    small = make_engine(kv_dtype=word, max_batch_tokens=5, block_size=1, kv_blocks=99)
    chunked = generated(small, PROMPTS)
    crowded = generated(make_engine(kv_dtype=word, kv_blocks=16), PROMPTS)
    alone = [generated(make_engine(kv_dtype=word), [prompt])[0] for prompt in PROMPTS]
    for other in (together, chunked, crowded):
        assert [tokens for tokens, _ in other] == [tokens for tokens, _ in alone]
        for (_, ours), (_, theirs) in zip(other, alone, strict=True):
            # A value half way between two codes may be rounded to either.
            assert ours == pytest.approx(theirs, abs=1e-3)


def test_auto_is_what_the_artifact_says(tiny_reference: tuple[Artifact, Any]) -> None:
    plain, calibrated = tiny_reference[0], read_artifact(FIXTURE)
    assert cache_dtype("auto", plain, torch.bfloat16) == torch.bfloat16
    assert cache_dtype("auto", calibrated, torch.bfloat16) == torch.float8_e4m3fn
    assert cache_dtype("int8", calibrated, torch.bfloat16) == torch.int8


def test_calibrated_scales_come_with_the_artifact() -> None:
    artifact = read_artifact(FIXTURE)
    settings = EngineSettings(device="cpu", dtype="float32", kv_blocks=8)
    runner = Engine.load(artifact, settings)._runner
    assert runner.cache.layers[0].dtype == torch.uint8
    for n, layer in enumerate(runner.decoder.layers):
        scales = layer.attention.kv_scales
        assert scales is not None
        stored = artifact.tensor(f"model.layers.{n}.self_attn.k_scale").float()
        assert float(scales.values[0]) == float(stored)

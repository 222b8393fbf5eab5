"""The whole runtime on the real default model: greedy, token for token as transformers has it."""

from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.models.hf import load_transformers
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.limits import read_eos_token_ids
from infopt.core.runtime.loaded import load_for
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.request import SamplingParams

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NEW = 24
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 1, 2, 15, 16, 17, 31, 32, 33, 5, 8, 40, 48, 64)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)


@pytest.fixture(scope="module")
def prompts(default_artifact: Artifact) -> list[list[int]]:
    """Twenty pieces of English, most of them a block or two long, give or take a token."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in ("assert", "class", "with", "while", "yield"))
    stream: list[int] = default_artifact.tokenizer().encode(text)
    return [stream[100 * n : 100 * n + length] for n, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def wanted(default_artifact: Artifact, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, one prompt at a time, end of sequence included."""
    torch.set_num_threads(1)
    model = load_transformers(default_artifact, torch.float32, CPU)
    found: list[list[int]] = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        made: Any = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def decoder(default_artifact: Artifact) -> Any:
    settings = EngineSettings(device="cpu", dtype="float32")
    return load_for(settings, default_artifact, torch.float32, CPU)


def engine_on(artifact: Artifact, decoder: Any, **changes: int) -> Engine:
    """An engine that shares the weights with the others."""
    settings = EngineSettings(**{"kv_blocks": 2048 // changes.get("block_size", 16), **changes})
    assert settings.kv_blocks is not None
    cache = KVCache(
        decoder.config,
        blocks=settings.kv_blocks,
        block_size=settings.block_size,
        dtype=torch.float32,
        device=CPU,
    )
    return Engine(
        ModelRunner.recorded("auto", decoder, cache),
        settings=settings,
        max_model_len=96,
        eos_token_ids=read_eos_token_ids(artifact),
    )


def finish(engine: Engine, made: dict[str, list[int]]) -> None:
    """Run to the end; an end of sequence is put back, as transformers includes it."""
    (end,) = engine.eos_token_ids
    while engine.has_work():
        for output in engine.step():
            made.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason == "stop":
                made[output.request_id].append(end)
        engine.check()


def differing(made: dict[str, list[int]], wanted: list[list[int]]) -> list[int]:
    return [n for n, tokens in enumerate(wanted) if made[str(n)] != tokens]


@pytest.mark.parametrize("block_size", [1, 16])
def test_alone(
    block_size: int,
    default_artifact: Artifact,
    decoder: Any,
    prompts: list[list[int]],
    wanted: list[list[int]],
) -> None:
    engine = engine_on(default_artifact, decoder, block_size=block_size)
    made: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, GREEDY)
        finish(engine, made)
    assert differing(made, wanted) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 1},
        {"max_batch_tokens": 23},
        {"block_size": 1, "kv_blocks": 260, "max_batch_tokens": 60},
        {"block_size": 16, "kv_blocks": 16},
    ],
    ids=str,
)
def test_together(
    default_artifact: Artifact,
    decoder: Any,
    prompts: list[list[int]],
    wanted: list[list[int]],
    changes: dict[str, int],
) -> None:
    engine = engine_on(default_artifact, decoder, **changes)
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, GREEDY)
    made: dict[str, list[int]] = {}
    finish(engine, made)
    assert differing(made, wanted) == []
    if "kv_blocks" in changes:
        assert engine.stats().preemptions > 0, "this case is here to preempt"
    assert engine.stats().blocks_used == 0

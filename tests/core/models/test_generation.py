"""Greedy generation over the paged cache, token for token as transformers, for every kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams

Tiny = Callable[[str], tuple[Artifact, Any]]
NEW = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
LENGTHS = (1, 10, 11, 12, 31)
"""About the window of the kinds that have one, and far beyond it."""


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Everything computed anew for each token: no cache has a part in it."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def generated(artifact: Artifact, prompts: list[list[int]], **changes: int) -> list[list[int]]:
    given = {"dtype": "float32", "device": "cpu", "block_size": 4, "kv_blocks": 64, **changes}
    engine = Engine.load(artifact, EngineSettings(**given))
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, GREEDY)
    found: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return [found[str(index)] for index in range(len(prompts))]


def test_greedy_equals_transformers_however_it_is_scheduled(kind: str, tiny: Tiny) -> None:
    artifact, model = tiny(kind)
    torch.manual_seed(3)
    prompts = [torch.randint(97, (n,)).tolist() for n in LENGTHS]
    wanted = [greedy(model, prompt) for prompt in prompts]
    for changes in (
        {},
        {"block_size": 1, "kv_blocks": 256, "max_batch_tokens": 7},
        {"block_size": 16, "max_batch_tokens": 1},
        {"kv_blocks": 14, "max_batch_tokens": 20},
    ):
        assert generated(artifact, prompts, **changes) == wanted, changes


@pytest.mark.parametrize("kind", ["mistral-window", "gemma3"])
def test_a_window_shows(kind: str, tiny: Tiny) -> None:
    """Beyond the window the first tokens of a prompt no longer matter to a layer with one."""
    artifact, _ = tiny(kind)
    wide = Artifact(**{**vars(artifact), "config": {**artifact.config, "sliding_window": 256}})
    prompts = [list(range(40)), list(range(50, 90))]
    assert generated(artifact, prompts) != generated(wide, prompts)

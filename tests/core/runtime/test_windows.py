"""Where all layers slide, blocks behind the window are given back while others go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams

WINDOW, NEW = 11, 20
PROMPTS = [
    torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, WINDOW, WINDOW + 1, 33, 60)
]


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[list[int]]]:
    """A model whose every layer slides, and what transformers makes of the prompts."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    model: Any = MistralForCausalLM(config).eval()
    folder: Path = tmp_path_factory.mktemp("models") / "sliding"
    model.save_pretrained(folder)
    wanted = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        for _ in range(NEW):
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
        wanted.append(tokens[0, len(prompt) :].tolist())
    return read_artifact(folder), wanted


@pytest.mark.parametrize(("block", "chunk", "blocks"), [(1, 512, 400), (4, 7, 100), (4, 512, 28)])
def test_what_is_behind_the_window_is_given_back_and_not_missed(
    sliding: tuple[Artifact, list[list[int]]], block: int, chunk: int, blocks: int
) -> None:
    artifact, wanted = sliding
    settings = EngineSettings(
        dtype="float32", device="cpu", block_size=block, max_batch_tokens=chunk, kv_blocks=blocks
    )
    engine = Engine.load(artifact, settings)
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    given_back = 0
    for turn in range(2):  # the second time with prefixes to be found
        for number, prompt in enumerate(PROMPTS):
            engine.add(f"{turn}-{number}", prompt, params)
        found: dict[str, list[int]] = {}
        while engine.has_work():
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
            engine.check()
            held = [b for group in engine._requests.values() for r in group for b in r.blocks]
            given_back = max(given_back, held.count(-1))
        assert [found[f"{turn}-{number}"] for number in range(len(PROMPTS))] == wanted
    assert given_back > 0
    assert engine.stats().blocks_used == 0

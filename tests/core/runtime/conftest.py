"""A tiny Llama with random weights, and engines on it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work is slower on two threads, and stalls where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Any]:
    """The artifact and the transformers model it was saved from."""
    path = tmp_path_factory.mktemp("runtime") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(path)
    return read_artifact(path), model


@pytest.fixture
def make_engine(tiny_reference: tuple[Artifact, Any]) -> Callable[..., Engine]:
    """An engine on the tiny model, with any settings."""

    def make(**settings: Any) -> Engine:
        values = {"dtype": "float32", "device": "cpu", "block_size": 4, "kv_blocks": 32, **settings}
        return Engine.load(tiny_reference[0], EngineSettings(**values))

    return make

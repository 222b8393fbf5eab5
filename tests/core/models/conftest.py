"""Tiny models with random weights, one of each kind that the decoder knows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact

SHAPE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama-biased-tied": dict(
        model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3-scaling": dict(model_type="llama", rope_parameters=LLAMA3),
    "mistral": dict(model_type="mistral", head_dim=8, sliding_window=None),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=24, num_key_value_heads=4),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Artifact, Any]]:
    """By kind: the artifact, and the transformers model it was saved from."""

    def make(kind: str) -> tuple[Artifact, Any]:
        path: Path = tmp_path_factory.mktemp("tiny") / kind
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **KINDS[kind]}))
        for name, parameter in model.named_parameters():
            # Random norms and biases, not ones and zeros: a forgotten one must show.
            offset = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.15)
        model.eval().save_pretrained(path)
        return read_artifact(path), model

    return make


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)

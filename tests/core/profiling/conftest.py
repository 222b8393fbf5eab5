"""Tiny configs of every kind that the static profile tells apart."""

from typing import Any

import pytest

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"architectures": ["LlamaForCausalLM"]},
    "mha, tied": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "mqa, own head size": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "biases everywhere": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qkv bias": {"architectures": ["Qwen2ForCausalLM"]},
    "qk norm, tied": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "sliding window": {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def hf_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SMALL, **request.param}


@pytest.fixture
def llama_2_7b() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }

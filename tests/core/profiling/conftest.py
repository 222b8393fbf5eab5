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
    "fused projections": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": None},
    "norms on both sides, windows and none": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 16,
        "sliding_window": 20,
        "tie_word_embeddings": True,
    },
    "windows, none and qk norm": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 16,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "learned positions": {"architectures": ["OPTForCausalLM"], "ffn_dim": 160},
    "projected embeddings": {
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": 160,
        "word_embed_proj_dim": 48,
        "do_layer_norm_before": False,
        "tie_word_embeddings": True,
    },
    "layer norms, tied": {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True},
}
# These have a key head for each head and say the width of their MLP in another word.
_PLAIN_HEADS = ("OPTForCausalLM", "GPT2LMHeadModel")


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def hf_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = {**SMALL, **request.param}
    if found["architectures"][0] in _PLAIN_HEADS:
        del found["num_key_value_heads"], found["intermediate_size"]
    return found


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

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
    "experts": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "experts in some layers": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "latents": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "latents of queries too": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
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

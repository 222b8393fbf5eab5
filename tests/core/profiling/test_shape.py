"""Experts, latents and windows in the static profile, against arithmetic on paper."""

import pytest

from infopt.core.errors import UnsupportedError
from infopt.core.profiling.shape import shape_of
from infopt.core.profiling.static import (
    kv_bytes_per_token,
    parameters,
    phase_cost,
    static_profile,
    total,
    weight_bytes,
)

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}


def test_deepseek_v3_is_671_billion_of_which_a_token_takes_37() -> None:
    shape = shape_of(DEEPSEEK_V3)
    profile = static_profile(
        shape,
        dtype="bfloat16",
        batch=1,
        prompt_tokens=1000,
        context=1024,
        device_memory=10**13,
    )
    assert profile.parameters / 1e9 == pytest.approx(671.0, abs=0.5)
    assert profile.active_parameters / 1e9 == pytest.approx(37.5, abs=0.5)
    # A latent and a rotary key a layer, no twice: 70,272 bytes a token.
    assert kv_bytes_per_token(shape, 2) == 61 * (512 + 64) * 2 == 70_272


def test_latents_are_expanded_in_prefill_and_not_in_decode() -> None:
    layer = shape_of(DEEPSEEK_V3).layers[0]
    pairs = 1000 * 1001 // 2
    assert layer.attention_flops(0, 1000) == pairs * 2 * 128 * (128 + 64 + 128)
    assert layer.attention_flops(4095, 1) == 4096 * 2 * 128 * (2 * 512 + 64)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 2.0), (2, 3.5), (1000, 8.0)])
def test_the_experts_that_tokens_reach(tokens: int, expected: float) -> None:
    config = {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    shape = shape_of(config)
    assert shape.layers[0].experts_read(tokens) == pytest.approx(expected)
    weights = weight_bytes(shape, 2)
    cost = phase_cost(shape, weights, batch=tokens, past=9, new=1, dtype_bytes=2)
    read = next(o.weight_bytes for o in cost.operators if o.name == "experts")
    assert read == pytest.approx(weights["experts"] * expected / 8)
    assert total(shape, parameters(shape)) / 1e9 == pytest.approx(46.7, abs=0.05)


def test_bits_stand_in_for_the_layers_weights_only() -> None:
    shape = shape_of(DEEPSEEK_V3)
    plain, packed = weight_bytes(shape, 2), weight_bytes(shape, 2, bits=4.25)
    assert packed["lm_head"] == plain["lm_head"] and packed["router"] == plain["router"]
    assert packed["experts"] == pytest.approx(plain["experts"] * 4.25 / 16)
    assert packed["qkv"] == pytest.approx(plain["qkv"] * 4.25 / 16)


def test_an_architecture_that_is_not_known_is_named() -> None:
    with pytest.raises(UnsupportedError, match="MambaForCausalLM"):
        shape_of({**DEEPSEEK_V3, "architectures": ["MambaForCausalLM"]})

from typing import Any

import pytest

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.models.config import ModelConfig, token_ids
from infopt.core.models.rope import Rope, RopeScaling

OLD_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "rope_scaling": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**OLD_LLAMA, **changes})


def test_what_an_old_config_leaves_unsaid() -> None:
    config = read()
    assert (config.kv_heads, config.head_dim, config.rope) == (32, 128, Rope(10000.0, 128))
    assert not (config.biases or config.tied_embeddings or config.experts or config.local_rope)
    assert config.eos_token_ids == (2,)
    assert config.full_attention_positions == 4096


def test_rope_of_transformers_4_and_5_read_alike() -> None:
    old = read(rope_theta=5e5, rope_scaling=LLAMA3)
    new = read(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert new.rope == Rope(5e5, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    linear = read(rope_scaling={"type": "linear", "factor": 2})
    assert linear.rope == Rope(10000.0, 128, RopeScaling("linear", 2))
    half = read(partial_rotary_factor=0.5)
    assert half.rope == Rope(10000.0, 64)


def test_local_layers_have_their_own_positions_in_transformers_4_and_5() -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "head_dim": 64}
    old = read(
        **gemma,
        rope_theta=1e6,
        rope_local_base_freq=5000,
        rope_scaling={"rope_type": "linear", "factor": 8},
    )
    new = read(
        **gemma,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000},
        },
    )
    assert old == new
    assert new.rope == Rope(1e6, 64, RopeScaling("linear", 8))
    assert new.local_rope == Rope(5000, 64)
    assert read(**gemma).local_rope == Rope(1e4, 64)


def test_longrope_ends_where_its_factors_change() -> None:
    phi = {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072}
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config = read(
        **phi, original_max_position_embeddings=4096, rope_scaling={"type": "su", **factors}
    )
    assert config.max_positions == 4096
    assert config.rope is not None and config.rope.scaling is not None
    assert config.rope.scaling.attention_factor == pytest.approx(1.19, abs=0.001)
    with pytest.raises(ArtifactError, match="3 values"):
        read(**phi, rope_scaling={"type": "longrope", "short_factor": [1.0] * 3})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "proportional"),
        ({"hidden_act": "mish"}, "mish"),
        (
            {"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear_attention"] * 32},
            "linear_attention",
        ),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read(**changes)


def test_an_unknown_architecture_names_the_known() -> None:
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM"):
        read(architectures=["MambaForCausalLM"])


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(ArtifactError, match=key):
        read(**{key: None})


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ArtifactError, match="32 attention heads"):
        read(num_key_value_heads=5)


def test_incomplete_scaling_is_named() -> None:
    with pytest.raises(ArtifactError, match="factor"):
        read(rope_scaling={"rope_type": "linear"})


def test_the_families_differ() -> None:
    qwen2 = read(architectures=["Qwen2ForCausalLM"], attention_bias=True)
    assert qwen2.biases == {"qkv"}
    qwen3 = read(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm and qwen3.head_dim == 128 and not qwen3.biases
    llama = read(attention_bias=True, mlp_bias=True)
    assert llama.biases == {"qkv", "output", "mlp"}
    mistral = read(architectures=["MistralForCausalLM"], attention_bias=True)
    assert not mistral.biases
    gpt2 = ModelConfig.from_hf(
        {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
        }
    )
    assert (gpt2.intermediate_size, gpt2.max_positions, gpt2.tied_embeddings) == (3072, 1024, True)
    assert gpt2.biases == {"qkv", "output", "mlp"} and gpt2.rope is None
    gemma = read(architectures=["Gemma2ForCausalLM"], query_pre_attn_scalar=144, hidden_act=None)
    assert (gemma.query_scale, gemma.attention_cap, gemma.logit_cap) == (1 / 12, 50, 30)
    assert gemma.windows[:3] == (None, None, None), "4096 positions are within the window"
    moe = read(
        architectures=["Qwen3MoeForCausalLM"],
        num_local_experts=16,
        moe_intermediate_size=64,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
    )
    assert moe.experts is not None and moe.experts.layers[:4] == (False, False, False, True)
    assert (moe.experts.count, moe.experts.per_token, moe.experts.normalized) == (16, 8, False)


def test_a_sliding_window_counts_only_where_it_limits() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    assert read(**mistral).sliding_window == 4096, "the default of Mistral's configuration"
    assert read(**mistral).full_attention_positions == 32768
    assert read(**mistral, sliding_window=None).sliding_window is None
    assert read(**mistral, sliding_window=32768).sliding_window is None
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert read(**qwen).sliding_window is None
    windows = read(**qwen, use_sliding_window=True, max_window_layers=30).windows
    assert windows == (None,) * 30 + (1024, 1024)
    gemma = read(architectures=["Gemma3ForCausalLM"], sliding_window=512, num_hidden_layers=7)
    assert gemma.windows == (512,) * 5 + (None, 512) and gemma.sliding_window is None


def test_token_ids() -> None:
    assert (token_ids(None), token_ids(7), token_ids([1, 2])) == ((), (7,), (1, 2))

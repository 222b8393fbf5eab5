from typing import Any

import pytest

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.models.config import ModelConfig, RopeScaling, token_ids

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
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias or config.tied_embeddings)
    assert config.eos_token_ids == (2,)
    assert config.full_attention_positions == 4096


def test_rope_of_transformers_4_and_5_read_alike() -> None:
    old = read(rope_theta=5e5, rope_scaling=LLAMA3)
    new = read(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling(
        "linear", 2
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"hidden_act": "gelu"}, "gelu"),
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
    assert qwen2.qkv_bias and not qwen2.output_bias
    qwen3 = read(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm and qwen3.head_dim == 128 and not qwen3.qkv_bias
    llama = read(attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias and llama.output_bias and llama.mlp_bias
    mistral = read(architectures=["MistralForCausalLM"], attention_bias=True)
    assert not mistral.qkv_bias


def test_a_sliding_window_counts_only_where_it_limits() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    assert read(**mistral).sliding_window == 4096, "the default of Mistral's configuration"
    assert read(**mistral).full_attention_positions == 4096
    assert read(**mistral, sliding_window=None).sliding_window is None
    assert read(**mistral, sliding_window=32768).sliding_window is None
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert read(**qwen).sliding_window is None
    assert read(**qwen, use_sliding_window=True).sliding_window == 1024


def test_token_ids() -> None:
    assert (token_ids(None), token_ids(7), token_ids([1, 2])) == ((), (7,), (1, 2))

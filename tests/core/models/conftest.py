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
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [9.0] * 6,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.75,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
WINDOW = 11
"""Shorter than the prompts of the tests."""
GEMMA: dict[str, Any] = dict(
    num_hidden_layers=3,
    head_dim=16,
    query_pre_attn_scalar=24,
    sliding_window=WINDOW,
    sliding_window_pattern=2,
)
KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama-biased-tied": dict(
        model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3-scaling": dict(model_type="llama", rope_parameters=LLAMA3),
    "yarn-scaling": dict(model_type="llama", rope_parameters=YARN),
    "dynamic-scaling": dict(model_type="llama", rope_parameters=DYNAMIC),
    "mistral": dict(model_type="mistral", head_dim=8, sliding_window=None),
    "mistral-window": dict(model_type="mistral", head_dim=8, sliding_window=WINDOW),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2-window": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": dict(model_type="qwen3", head_dim=24, num_key_value_heads=4),
    "phi3": dict(model_type="phi3", sliding_window=WINDOW),
    "phi3-longrope": dict(model_type="phi3", rope_parameters=LONGROPE),
    "gemma2": dict(
        model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA
    ),
    "gemma3": dict(model_type="gemma3_text", rope_parameters=LOCAL_AND_GLOBAL, **GEMMA),
    "opt": dict(model_type="opt", ffn_dim=80),
    "opt-norms-after": dict(
        model_type="opt",
        ffn_dim=80,
        do_layer_norm_before=False,
        word_embed_proj_dim=48,
        enable_bias=False,
        activation_function="gelu",
    ),
    "gpt2": dict(model_type="gpt2"),
    "mixtral": dict(
        model_type="mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "qwen3-moe": dict(
        model_type="qwen3_moe",
        head_dim=24,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        mlp_only_layers=[0],
    ),
    "qwen3-moe-normalized": dict(
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=True,
    ),
}
# These have as many key heads as heads, and do not say so; their MLPs have their own key.
_PLAIN_HEADS = ("opt", "gpt2")


def shape_of(kind: str) -> dict[str, Any]:
    """The arguments of transformers' config."""
    given = {**SHAPE, **KINDS[kind]}
    if given["model_type"] in _PLAIN_HEADS:
        del given["num_key_value_heads"], given["intermediate_size"]
    return given


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Artifact, Any]]:
    """By kind: the artifact, and the transformers model it was saved from."""

    def make(kind: str) -> tuple[Artifact, Any]:
        path: Path = tmp_path_factory.mktemp("tiny") / kind
        torch.manual_seed(0)
        # Eager attention: SDPA knows no caps.
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape_of(kind)), attn_implementation="eager"
        )
        for name, parameter in model.named_parameters():
            # Random norms and biases, not ones and zeros: a forgotten one must show.
            offset = 1.0 if "norm" in name or ".ln_" in name else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.15)
        model.eval().save_pretrained(path)
        return read_artifact(path), model

    return make


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)

"""Angles and rotation against transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from infopt.core.layers.rotary import Rotary, inverse_frequencies
from infopt.core.models.config import ModelConfig

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + n / 8 for n in range(16)],
        "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 2048,
        "factor": 8.0,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rotation_equals_transformers(scaling: dict[str, Any]) -> None:
    hf = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_theta": 50000.0, **scaling},
    )
    config = ModelConfig.from_hf(hf.to_dict())
    rope = config.rope
    assert rope is not None
    frequencies = inverse_frequencies(rope.dim, rope.theta, rope.scaling)
    magnitude = rope.scaling.attention_factor if rope.scaling else 1.0
    positions = torch.tensor([0, 1, 5, 300, 2047])
    query_key = torch.randn(5, 3, 32)
    reference = LlamaRotaryEmbedding(hf)
    assert torch.equal(frequencies, reference.inv_freq)
    cos, sin = reference(query_key, positions[None])
    wanted, _ = apply_rotary_pos_emb(query_key[None], query_key[None], cos, sin, unsqueeze_dim=2)
    rotary = Rotary.at(positions, frequencies, torch.float32, magnitude)
    rotated = rotary.rotate_(query_key.clone())
    torch.testing.assert_close(rotated, wanted[0], atol=1e-6, rtol=1e-6)


def test_rotation_is_in_place_on_a_slice() -> None:
    whole = torch.randn(2, 4, 8)
    kept = whole[:, 3].clone()
    rotary = Rotary.at(torch.tensor([3, 4]), inverse_frequencies(8, 1e4), torch.float32)
    wanted = rotary.rotate_(whole[:, :3].clone())
    rotary.rotate_(whole[:, :3])
    assert torch.equal(whole[:, :3], wanted)
    assert torch.equal(whole[:, 3], kept)


def test_a_partial_rotation_leaves_the_rest_of_a_head() -> None:
    x = torch.randn(2, 3, 8)
    rotary = Rotary.at(torch.tensor([3, 4]), inverse_frequencies(6, 1e4), torch.float32)
    rotated = rotary.rotate_(x.clone())
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert torch.equal(rotated[..., :6], rotary.rotate_(x[..., :6].clone()))
    assert not torch.equal(rotated[..., :6], x[..., :6])

"""The parts of a model are found by what it computes, and refused where they depend on others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma import GemmaConfig
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.anatomy import anatomy
from infopt.core.compression.dissect import Axis
from infopt.core.errors import UnsupportedError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def saved(config: Any, path: Path) -> Artifact:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return read_artifact(path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "opt", "gpt2", "bloom"])
def test_every_part_of_common_families_is_proved(
    make_model: Callable[[str], Artifact], family: str
) -> None:
    parts = anatomy(make_model(family))
    assert parts.why_not == {}
    groups = {"opt": 4, "bloom": 4, "gpt2": 2}.get(family, 2)
    assert parts.kv_groups == groups
    assert parts.ffn_size == (128 if family in ("gpt2", "bloom") else 64)
    assert parts.hidden_size == 32
    for block in parts.blocks:
        assert block.heads is not None
        assert block.ffn is not None


def test_the_parts_of_a_llama_are_these(make_model: Callable[[str], Artifact]) -> None:
    parts = anatomy(make_model("llama"))
    heads, ffn = parts.blocks[1].heads, parts.blocks[1].ffn
    assert heads is not None
    assert ffn is not None
    name = "model.layers.1"
    assert set(heads.axes) == {
        Axis(f"{name}.self_attn.q_proj.weight", 0, ((0, 16, 16),)),
        Axis(f"{name}.self_attn.k_proj.weight", 0, ((0, 8, 8),)),
        Axis(f"{name}.self_attn.v_proj.weight", 0, ((0, 8, 8),)),
        Axis(f"{name}.self_attn.o_proj.weight", 1, ((0, 16, 16),)),
    }
    assert heads.writer == f"{name}.self_attn.o_proj"
    assert set(ffn.axes) == {
        Axis(f"{name}.mlp.gate_proj.weight", 0, ((0, 1, 1),)),
        Axis(f"{name}.mlp.up_proj.weight", 0, ((0, 1, 1),)),
        Axis(f"{name}.mlp.down_proj.weight", 1, ((0, 1, 1),)),
    }
    around = {a.parameter: a.axis for a in parts.hidden if ".layers." not in a.parameter}
    assert around == {"model.embed_tokens.weight": 1, "model.norm.weight": 0, "lm_head.weight": 1}
    inside = {a.parameter: a.axis for a in parts.hidden if name in a.parameter}
    assert inside == {
        f"{name}.input_layernorm.weight": 0,
        f"{name}.post_attention_layernorm.weight": 0,
        **{f"{name}.self_attn.{layer}_proj.weight": 1 for layer in "qkv"},
        f"{name}.self_attn.o_proj.weight": 0,
        f"{name}.mlp.gate_proj.weight": 1,
        f"{name}.mlp.up_proj.weight": 1,
        f"{name}.mlp.down_proj.weight": 0,
    }


def test_the_parts_of_fused_projections_are_told_apart(
    make_model: Callable[[str], Artifact], tmp_path: Path
) -> None:
    def pieces(artifact: Artifact, leaf: str) -> tuple[tuple[int, int, int], ...]:
        block = anatomy(artifact).blocks[0]
        axes = [a for g in (block.heads, block.ffn) if g is not None for a in g.axes]
        return next(a.pieces for a in axes if a.parameter.endswith(leaf))

    phi = make_model("phi3")
    # 4 heads of 8 on 2 key heads: queries, keys and values side by side; gate, then up.
    assert pieces(phi, "qkv_proj.weight") == ((0, 16, 16), (32, 8, 8), (48, 8, 8))
    assert pieces(phi, "gate_up_proj.weight") == ((0, 1, 1), (64, 1, 1))
    assert pieces(make_model("gpt2"), "c_attn.bias") == ((0, 16, 16), (32, 16, 16), (64, 16, 16))
    # GPT-NeoX lays query, key and value of one head side by side.
    neox = saved(GPTNeoXConfig(**SIZES), tmp_path / "neox")
    assert pieces(neox, "query_key_value.weight") == ((0, 24, 24),)


def test_indices_of_units() -> None:
    axis = Axis("w", 0, ((0, 4, 4), (8, 2, 2)))
    assert axis.indices([1]).tolist() == [4, 5, 6, 7, 10, 11]
    assert axis.indices([0, 1]).tolist() == list(range(12))
    assert axis.by_unit(2).tolist() == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11]]
    assert axis.unit_size == 6


def test_gemma_and_biases(tmp_path: Path) -> None:
    gemma = anatomy(saved(GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8), tmp_path / "g"))
    assert gemma.why_not == {}
    biased = LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    parts = anatomy(saved(biased, tmp_path / "l"))
    assert parts.why_not == {}
    hidden = {a.parameter for a in parts.hidden}
    assert "model.layers.0.self_attn.o_proj.bias" in hidden
    assert "model.layers.0.self_attn.q_proj.bias" not in hidden


def test_a_norm_over_all_heads_binds_them_together(tmp_path: Path) -> None:
    # OLMo 2 normalizes the queries of all heads as one vector.
    parts = anatomy(saved(Olmo2Config(**SIZES), tmp_path / "olmo"))
    assert "heads" in parts.why_not
    assert parts.ffn_size == 48
    with pytest.raises(UnsupportedError, match="attention heads of olmo cannot be cut"):
        parts.require("heads")


def test_a_single_key_head_is_no_group_to_cut(tmp_path: Path) -> None:
    parts = anatomy(saved(LlamaConfig(**SIZES, num_key_value_heads=1), tmp_path / "mqa"))
    assert "share one key head" in parts.why_not["heads"]
    assert "ffn" not in parts.why_not


def test_of_experts_only_layers_can_be_cut(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    parts = anatomy(saved(config, tmp_path / "moe"))
    assert set(parts.why_not) == {"heads", "ffn", "hidden"}
    assert "mixture of experts" in parts.why_not["ffn"]
    assert len(parts.blocks) == 2

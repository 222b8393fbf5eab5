"""The residual stream is found, or the reason why it cannot be rotated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.residual import Residual, Turn, rotate_parameters
from infopt.core.compression.streams import find_residual
from infopt.core.errors import UnsupportedError
from infopt.core.formats.hadamard import rotation
from infopt.core.models.hf import load_transformers

SHAPE: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
MLA = dict(q_lora_rank=16, kv_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=4, v_head_dim=10)
EXPERTS = dict(moe_intermediate_size=32, num_experts=4, shared_expert_intermediate_size=24)
GOOD: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", head_dim=10, num_key_value_heads=4),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "phi3": dict(model_type="phi3"),
    "gemma": dict(model_type="gemma", head_dim=16),
    "granite": dict(model_type="granite", residual_multiplier=0.5, logits_scaling=2.0),
    "mixtral": dict(model_type="mixtral", num_local_experts=4),
    # More experts than the few tokens reach.
    "qwen2-moe": dict(
        model_type="qwen2_moe", **EXPERTS | {"num_experts": 24}, decoder_sparse_step=2
    ),
    "deepseek": dict(
        model_type="deepseek_v2", **MLA, first_k_dense_replace=2, head_dim=8, num_key_value_heads=4
    ),
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (dict(model_type="gpt2", n_embd=48, n_head=4, n_layer=2), "ln_f is a LayerNorm"),
    "opt": (
        dict(model_type="opt", ffn_dim=80, word_embed_proj_dim=48),
        "final_layer_norm is a LayerNorm",
    ),
    "cohere": (dict(model_type="cohere"), "model.norm is a LayerNorm: taking the mean away"),
    "gemma2": (
        dict(model_type="gemma2", head_dim=16),
        "post_attention_layernorm normalizes what self_attn.o_proj writes",
    ),
    "gemma3": (dict(model_type="gemma3_text", head_dim=16), "post_attention_layernorm normalizes"),
    "olmo2": (dict(model_type="olmo2"), "no norm stands right before the layers"),
}


def save(config: dict[str, Any], path: Path) -> Artifact:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE | config))
    for name, parameter in model.named_parameters():
        # Random norms and biases, not ones and zeros: a forgotten one must show.
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(path)
    return read_artifact(path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[dict[str, Any]], Artifact]:
    return lambda config: save(config, tmp_path / "model")


def turn_of(residual: Residual, seed: int) -> Turn:
    values = {layer: rotation(way.size, seed + 1) for layer, way in residual.values.items()}
    return Turn(residual, rotation(residual.size, seed), values)


@pytest.mark.parametrize("family", list(GOOD))
@torch.no_grad()
def test_a_rotated_model_computes_the_same(
    make: Callable[[dict[str, Any]], Artifact], family: str
) -> None:
    artifact = make(GOOD[family])
    residual = find_residual(artifact)
    model = load_transformers(artifact, torch.float32, torch.device("cpu"))
    ids = torch.arange(24).reshape(2, 12)
    before = model(input_ids=ids, output_hidden_states=True)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    rotate_parameters(turn := turn_of(residual, 3), model)
    after = model(input_ids=ids, output_hidden_states=True)
    assert float((after.logits - before.logits).abs().max()) < 1e-4
    # It is rotated, not left alone: the stream is the former one times Q.
    states = [before.hidden_states[1], after.hidden_states[1]]
    assert float((turn.stream.apply(states[0]) - states[1]).abs().max()) < 1e-4
    assert float((states[0] - states[1]).abs().max()) > 0.1
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    inner = ("q_b_proj.weight", "kv_b_proj.weight")  # between MLA's own projections
    wide = {n for n, p in weights.items() if 48 in p.shape and not n.endswith((*inner, "bias"))}
    assert wide <= changed


def test_the_roles_of_a_llama(make: Callable[[dict[str, Any]], Artifact]) -> None:
    found = find_residual(make(GOOD["llama"]))
    assert found.size == 48
    assert found.embeddings == {"model.embed_tokens"} and found.heads == {"lm_head"}
    block = "model.layers.1"
    assert found.norms[f"{block}.input_layernorm"] == 0.0
    assert found.readers["lm_head"] == "model.norm"
    assert found.readers[f"{block}.self_attn.q_proj"] == f"{block}.input_layernorm"
    assert found.readers[f"{block}.mlp.up_proj"] == f"{block}.post_attention_layernorm"
    assert {w for w in found.writers if w.startswith(block)} == {
        f"{block}.self_attn.o_proj",
        f"{block}.mlp.down_proj",
    }
    way = found.values[f"{block}.self_attn.v_proj"]
    assert (way.start, way.stop, way.size) == (0, 24, 12)
    assert way.output == f"{block}.self_attn.o_proj"
    assert len(found.readers) == 11 and len(found.norms) == 5 and len(found.values) == 2


def test_the_values_of_a_fused_layer_are_its_last_rows(
    make: Callable[[dict[str, Any]], Artifact],
) -> None:
    way = find_residual(make(GOOD["phi3"])).values["model.layers.0.self_attn.qkv_proj"]
    assert (way.start, way.stop, way.size) == (72, 96, 12)


def test_gemma_adds_one_to_its_norms_and_mla_has_no_plain_way_of_values(
    make: Callable[[dict[str, Any]], Artifact], tmp_path: Path
) -> None:
    assert set(find_residual(make(GOOD["gemma"])).norms.values()) == {1.0}
    found = find_residual(save(GOOD["deepseek"], tmp_path / "mla"))
    assert not found.values
    assert "model.layers.0.self_attn.q_b_proj" not in {*found.readers, *found.writers}


def test_every_expert_and_the_router_have_their_roles(
    make: Callable[[dict[str, Any]], Artifact],
) -> None:
    found = find_residual(make(GOOD["qwen2-moe"]))
    experts = "model.layers.1.mlp.experts"
    for number in range(24):
        assert f"{experts}.{number}.gate_proj" in found.readers
        assert f"{experts}.{number}.up_proj" in found.readers
        assert f"{experts}.{number}.down_proj" in found.writers
    assert "model.layers.1.mlp.gate" in found.readers


@pytest.mark.parametrize("family", list(BAD))
def test_the_unfit_are_refused_with_the_reason(
    make: Callable[[dict[str, Any]], Artifact], family: str
) -> None:
    config, reason = BAD[family]
    with pytest.raises(UnsupportedError, match="cannot be rotated") as caught:
        find_residual(make(config))
    assert reason in caught.value.message
    assert caught.value.hint


def test_a_block_that_minds_a_rotation_is_refused_by_its_numbers(
    make: Callable[[dict[str, Any]], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *a, **k: forward(*a, **k).relu())
    with pytest.raises(UnsupportedError, match=r"layers\.0 computes something else"):
        find_residual(make(GOOD["llama"]))

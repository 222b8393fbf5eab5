"""The arithmetic against torch's own counting, the tensors' bytes and published figures."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from infopt.core.artifact.headers import TensorHeader
from infopt.core.artifact.read import Artifact
from infopt.core.models.config import ModelConfig
from infopt.core.profiling.shape import ModelShape, shape_of
from infopt.core.profiling.static import (
    attended,
    kv_bytes,
    kv_bytes_per_token,
    operator_of,
    parameters,
    phase_cost,
    static_profile,
    total,
    weight_bytes,
)
from infopt.core.runtime.kv_cache import block_bytes
from infopt.kernels.attention.cache import new_cache


def build(hf_config: dict[str, Any]) -> PreTrainedModel:
    """The transformers model with eager attention, whose products the counter sees."""
    kind = getattr(transformers, hf_config["architectures"][0]).config_class
    config = kind(**hf_config, attn_implementation="eager", experts_implementation="eager")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def counted(model: PreTrainedModel, **inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**inputs)
    return counter.get_total_flops()


def attention_excess(shape: ModelShape, past: int, new: int, batch: int) -> float:
    """Eager attention multiplies all keys by all queries; what is masked away is not work."""
    pairs = len(shape.layers) * new * (past + new)
    useful = attended(shape, past + new) - attended(shape, past)
    return shape.layers[0].pair_flops * (pairs - useful) * batch + expansion(
        shape, past, new, batch
    )


def expansion(shape: ModelShape, past: int, new: int, batch: int) -> float:
    """transformers expands cached latents at every step, where queries taken to them cost less."""
    return batch * sum(
        (layer.pairs(past + new) - layer.pairs(past)) * layer.pair_flops
        + 2 * layer.kv_up * past
        - layer.attention_flops(past, new)
        for layer in shape.layers
        if layer.latent_pair_flops
    )


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (3, 33)])
def test_prefill_flops_are_those_of_torch(hf_config, batch: int, tokens: int) -> None:
    config, model = shape_of(hf_config), build(hf_config)
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    found = counted(model, input_ids=ids, logits_to_keep=1, use_cache=False)
    cost = phase_cost(
        config, weight_bytes(config, 4), batch=batch, past=0, new=tokens, dtype_bytes=4
    )
    corrected = found - attention_excess(config, 0, tokens, batch)
    assert cost.flops == pytest.approx(corrected, rel=0.01)
    assert cost.tokens == batch * tokens


@pytest.mark.parametrize(("batch", "context"), [(1, 64), (3, 16)])
def test_decode_flops_are_those_of_torch(hf_config, batch: int, context: int) -> None:
    config, model = shape_of(hf_config), build(hf_config)
    cache = DynamicCache()  # full length: the sliding window is corrected for
    ids = torch.zeros(batch, context, dtype=torch.int64)
    with torch.inference_mode():
        model(input_ids=ids[:, 1:], past_key_values=cache, use_cache=True)
    found = counted(model, input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    cost = phase_cost(
        config, weight_bytes(config, 4), batch=batch, past=context - 1, new=1, dtype_bytes=4
    )
    corrected = found - attention_excess(config, context - 1, 1, batch)
    assert cost.flops == pytest.approx(corrected, rel=0.01)


def test_parameters_and_bytes_are_the_tensors(hf_config) -> None:
    config, model = shape_of(hf_config), build(hf_config)
    counts = parameters(config)
    assert total(config, counts) == sum(p.numel() for p in model.parameters())
    assert total(config, weight_bytes(config, 4)) == sum(p.nbytes for p in model.parameters())
    headers = {
        name: TensorHeader(None, "float32", tuple(p.shape), p.nbytes)  # type: ignore[arg-type]
        for name, p in model.named_parameters()
    }
    assert weight_bytes(config, 4, headers) == weight_bytes(config, 4)
    assert total(config, weight_bytes(config, 2, headers)) * 2 == sum(
        p.nbytes for p in model.parameters()
    )


def test_the_cache_is_what_transformers_holds(hf_config) -> None:
    config, model = shape_of(hf_config), build(hf_config)
    cache = DynamicCache()
    with torch.inference_mode():
        model(
            input_ids=torch.zeros(2, 10, dtype=torch.int64), past_key_values=cache, use_cache=True
        )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(config, batch=2, context=10, dtype_bytes=4) == held


def test_a_sliding_window_bounds_the_cache() -> None:
    config = shape_of(MISTRAL)
    assert {layer.window for layer in config.layers} == {4096}
    unbound = tuple(replace(layer, window=None) for layer in config.layers)
    full = replace(config, layers=unbound)
    long = kv_bytes(config, batch=1, context=9000, dtype_bytes=2)
    assert long == kv_bytes(full, batch=1, context=4096, dtype_bytes=2)
    assert attended(config, 5000) == 32 * sum(min(i, 4096) for i in range(1, 5001))
    assert attended(full, 5000) == 32 * 5000 * 5001 // 2
    mixed = replace(config, layers=(*config.layers[:16], *unbound[16:]))
    assert 2 * attended(mixed, 5000) == attended(config, 5000) + attended(full, 5000)
    both = long + kv_bytes(full, batch=1, context=9000, dtype_bytes=2)
    assert 2 * kv_bytes(mixed, batch=1, context=9000, dtype_bytes=2) == both
    decode = [
        phase_cost(c, weight_bytes(c, 2), batch=1, past=8999, new=1, dtype_bytes=2).bytes
        for c in (config, mixed, full)
    ]
    assert decode[1] == (decode[0] + decode[2]) / 2


@pytest.mark.parametrize("head_dim", [16, 10])
def test_an_8_bit_cache_is_counted_as_the_runtime_holds_it(head_dim: int) -> None:
    hf_config = {**MISTRAL, "head_dim": head_dim}
    config, model = shape_of(hf_config), ModelConfig.from_hf(hf_config)
    for kept in (torch.int8, torch.float8_e4m3fn):
        held = block_bytes(model, 1, kept)
        assert kv_bytes_per_token(config, 2, kv_8bit=True) == held
        cache = new_cache(3, 5, model.kv_heads, head_dim, kept, torch.device("cpu"))
        assert cache.nbytes * model.layers == 15 * held
    profiles = [
        static_profile(
            config,
            dtype="bfloat16",
            batch=2,
            prompt_tokens=10,
            context=50,
            device_memory=10**12,
            kv_8bit=kv_8bit,
        )
        for kv_8bit in (True, False)
    ]
    saved = kv_bytes_per_token(config, 2) - kv_bytes_per_token(config, 2, kv_8bit=True)
    assert profiles[1].kv_bytes - profiles[0].kv_bytes == 2 * 50 * saved
    assert profiles[1].decode.bytes - profiles[0].decode.bytes == 2 * 51 * saved


MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}


def test_the_guides_cache(llama_2_7b) -> None:
    """Llama-2-7B, 4096 tokens, fp16: 2.15 GB; a batch of 32: 68.7 GB."""
    config = shape_of(llama_2_7b)
    one = kv_bytes(config, batch=1, context=4096, dtype_bytes=2)
    assert f"{one / 1e9:.2f}" == "2.15"
    assert f"{kv_bytes(config, batch=32, context=4096, dtype_bytes=2) / 1e9:.1f}" == "68.7"
    assert kv_bytes_per_token(config, 2) == 524288
    assert total(config, parameters(config)) == 6738415616


def test_prefill_of_an_8b_model_is_the_right_figure() -> None:
    """Llama-3.1-8B, 8192 tokens: 131.9 TFLOP, not the 166.7 of all parameters without causality."""
    config = shape_of(
        {**MISTRAL, "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
        | {"max_position_embeddings": 131072, "sliding_window": None}
    )
    cost = phase_cost(config, weight_bytes(config, 2), batch=1, past=0, new=8192, dtype_bytes=2)
    assert cost.flops / 1e12 == pytest.approx(131.9, abs=0.05)
    assert kv_bytes_per_token(config, 2) == 131072


def test_bytes_of_a_decode_step(llama_2_7b) -> None:
    config = shape_of(llama_2_7b)
    weights = weight_bytes(config, 2)
    cost = phase_cost(config, weights, batch=4, past=99, new=1, dtype_bytes=2)
    table, row, token = weights["embedding"], 2 * 4096, 524288
    read = total(config, weights) - table + 4 * row
    assert cost.bytes == read + 4 * (100 + 1) * token
    assert cost.flops == 2 * 4 * (total(config, parameters(config)) - 32000 * 4096 - 65 * 4096) + (
        4 * 32 * 32 * 128 * 100 * 4
    )
    assert cost.bytes == sum(o.weight_bytes + o.activation_bytes for o in cost.operators)


def test_a_tied_table_is_read_once_as_lm_head(hf_config) -> None:
    config = shape_of(hf_config)
    weights = weight_bytes(config, 2)
    cost = phase_cost(config, weights, batch=1, past=9, new=1, dtype_bytes=2)
    by_name = {operator.name: operator for operator in cost.operators}
    assert by_name["lm_head"].weight_bytes == 500 * config.embedding_size * 2
    assert by_name["embedding"].weight_bytes == config.embedding_size * 2
    if config.position_rows:
        assert by_name["positions"].weight_bytes == 64 * 2


def test_a_tied_table_may_be_stored_under_either_name() -> None:
    config = replace(shape_of(MISTRAL), tied_embeddings=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = TensorHeader(None, "bfloat16", (32000, 4096), 32000 * 4096 * 2)  # type: ignore[arg-type]
        found = weight_bytes(config, 2, {name: table})
        assert found["embedding"] == found["lm_head"] == total(config, found) == table.nbytes


def test_quantized_layers_count_as_they_are_stored() -> None:
    config = shape_of({**MISTRAL, "num_hidden_layers": 1})
    wide = "model.layers.0.self_attn.q_proj"
    headers = {
        f"{wide}.qweight": TensorHeader(None, "int32", (512, 4096), 512 * 4096 * 4),  # type: ignore[arg-type]
        f"{wide}.scales": TensorHeader(None, "float16", (32, 4096), 32 * 4096 * 2),  # type: ignore[arg-type]
        "model.layers.0.mlp.down_proj.weight": TensorHeader(None, "bfloat16", (8, 8), 128),  # type: ignore[arg-type]
    }
    found = weight_bytes(config, 4, headers)
    assert found["qkv"] == 512 * 4096 * 4 + 32 * 4096 * 2
    assert found["down"] == 256


def test_operators_by_tensor_name() -> None:
    assert operator_of("model.layers.0.self_attn.q_norm.weight") == "norms"
    assert operator_of("model.layers.0.post_attention_layernorm.weight") == "norms"
    assert operator_of("model.layers.0.self_attn.o_proj.qweight") == "o"
    assert operator_of("model.layers.0.mlp.up_proj.scales") == "gate_up"
    assert operator_of("transformer.h.0.attn.c_proj.weight") == "o"
    assert operator_of("transformer.h.0.mlp.c_proj.weight") == "down"
    assert operator_of("transformer.h.0.ln_1.bias") == operator_of("ln_f.bias") == "norms"
    assert operator_of("model.decoder.layers.0.self_attn.out_proj.bias") == "o"
    assert operator_of("something.else") == "other"


def test_the_largest_batch_is_the_largest(llama_2_7b) -> None:
    config = shape_of(llama_2_7b)
    memory = 80 * 10**9

    def at(batch: int) -> Any:
        return static_profile(
            config,
            dtype="float16",
            batch=batch,
            prompt_tokens=512,
            context=4096,
            device_memory=memory,
        )

    largest = at(1).largest_batch
    assert largest > 1
    assert at(largest).fits and not at(largest + 1).fits
    assert at(largest).memory_bytes <= memory < at(largest + 1).memory_bytes
    small = static_profile(
        config, dtype="float16", batch=1, prompt_tokens=512, context=4096, device_memory=10**9
    )
    assert small.largest_batch == 0 and not small.fits


def test_the_default_model(default_artifact: Artifact) -> None:
    """Parameters, bytes and FLOPs of the real model against its files and torch's counting."""
    config = shape_of(default_artifact.config)
    profile = static_profile(
        config,
        dtype="bfloat16",
        batch=1,
        prompt_tokens=128,
        context=160,
        device_memory=10**10,
        headers=default_artifact.headers,
    )
    assert profile.parameters == default_artifact.summary().parameters == 134_515_008
    assert profile.weight_bytes == default_artifact.weight_bytes
    assert profile.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    model = AutoModelForCausalLM.from_pretrained(
        default_artifact.path, attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.zeros(1, 128, dtype=torch.int64)
    found = counted(model, input_ids=ids, logits_to_keep=1, use_cache=False)
    excess = attention_excess(config, 0, 128, 1)
    assert profile.prefill.flops == pytest.approx(found - excess, rel=0.01)

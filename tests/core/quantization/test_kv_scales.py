import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.formats.scheme import KvFormat
from infopt.core.models.hf import load_transformers
from infopt.core.models.kv_rounding import kv_number_format, round_kv
from infopt.core.quantization.kv_scales import record_kv

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers.{}.self_attn", GATED),
    "qwen3": ("model.layers.{}.self_attn", {**GATED, "head_dim": 8}),
    "phi3": ("model.layers.{}.self_attn", {**GATED, "pad_token_id": 0}),
    "mixtral": ("model.layers.{}.self_attn", {**GATED, "num_local_experts": 2}),
    "opt": (
        "model.decoder.layers.{}.self_attn",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "gpt2": ("transformer.h.{}.attn", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bloom": ("transformer.h.{}.self_attention", {"vocab_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox.layers.{}.attention", {**SIZES, "intermediate_size": 64}),
}
Make = Callable[[str], Artifact]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def saved(family: str) -> Artifact:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **FAMILIES[family][1])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / family)
        return read_artifact(tmp_path / family)

    return saved


def make_walk(artifact: Artifact) -> tuple[Walk, list[Tensor]]:
    data = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(1))
    batches = [data[:2], data[2:4], data[4:]]
    walk = Walk(artifact, data[:1, :8], batches, torch.float32, CPU)
    walk.start()
    return walk, batches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_the_scales_are_those_of_what_the_model_caches(
    make: Make, family: str, form: KvFormat
) -> None:
    artifact = make(family)
    walk, batches = make_walk(artifact)
    found: dict[str, Tensor] = {}
    for _ in walk.names:
        walk.load()
        found |= record_kv(walk, form)
        walk.advance()
    model = load_transformers(artifact, torch.float32, CPU)
    caches = [model(batch, use_cache=True).past_key_values for batch in batches]
    largest = kv_number_format(form).largest
    wanted = {
        f"{FAMILIES[family][0].format(n)}.{kind}": max(
            float(getattr(cache.layers[n], states).abs().amax()) / largest for cache in caches
        )
        for n in range(2)
        for kind, states in (("k_scale", "keys"), ("v_scale", "values"))
    }
    assert found.keys() == wanted.keys()
    for name, scale in found.items():
        assert scale.shape == (1,) and scale.dtype == torch.float32
        assert float(scale) == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_a_walk_with_a_rounded_cache_ends_where_the_saved_model_does(
    make: Make, form: KvFormat
) -> None:
    artifact = make("llama")
    walk, _ = make_walk(artifact)
    scales: dict[str, Tensor] = {}
    for _ in walk.names:
        walk.load()
        new = record_kv(walk, form)
        handles = round_kv(walk.model, new, form)
        walk.advance()
        for handle in handles:
            handle.remove()
        scales |= new
    found = walk.probe_logits()
    before = load_transformers(artifact, torch.float32, CPU)(walk.tokens[0]).logits
    file = artifact.path / "model.safetensors"
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    config = json.loads((artifact.path / "config.json").read_text())
    kind = "int" if form == "int8" else "float"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False},
    }
    (artifact.path / "config.json").write_text(json.dumps(config))
    model = load_transformers(read_artifact(artifact.path), torch.float32, CPU)
    torch.testing.assert_close(found, model(walk.tokens[0]).logits, atol=1e-4, rtol=1e-4)
    assert float((found - before).norm() / before.norm()) > 1e-3, "the rounding shows"


def test_values_that_are_all_zero_get_a_scale_to_divide_by(make: Make) -> None:
    walk, _ = make_walk(make("llama"))
    walk.load()
    walk.layer("model.layers.0.self_attn.v_proj").weight.data.zero_()
    assert float(record_kv(walk, "int8")["model.layers.0.self_attn.v_scale"]) == 1.0


def test_keys_that_are_not_finite_are_named(make: Make) -> None:
    walk, _ = make_walk(make("llama"))
    walk.load()
    walk.layer("model.layers.0.self_attn.k_proj").weight.data[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"keys of model\.layers\.0\.self_attn"):
        record_kv(walk, "int8")


def test_a_block_without_a_cache_is_refused(make: Make) -> None:
    walk, _ = make_walk(make("llama"))
    walk.load()

    class Free(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    walk.block.self_attn = Free()
    with pytest.raises(UnsupportedError, match=r"layers\.0 of llama hands no keys"):
        record_kv(walk, "int8")

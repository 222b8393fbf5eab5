import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import round_inputs
from infopt.core.formats.scheme import KvFormat
from infopt.core.models.hf import load_transformers
from infopt.core.models.kv_rounding import kv_number_format, on_update, round_kv

CPU = torch.device("cpu")
FORMS: tuple[KvFormat, ...] = ("int8", "fp8")
_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[str, Any]] = {
    "llama": (
        "model.layers.{}.self_attn",
        LlamaConfig(**_SIZES, intermediate_size=64, num_key_value_heads=2),
    ),
    # It calls the cache `layer_past`.
    "gpt_neox": ("gpt_neox.layers.{}.attention", GPTNeoXConfig(**_SIZES, intermediate_size=64)),
    "gpt2": ("transformer.h.{}.attn", GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
}
TOKENS = torch.arange(3, 30)[None]


def save(path: Path, family: str = "llama") -> Artifact:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family][1], dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return read_artifact(path)


def with_cache_scheme(path: Path, form: KvFormat, scales: dict[str, Tensor]) -> Artifact:
    """The artifact at `path` as a writer of quantized caches leaves it."""
    file = path / "model.safetensors"
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kind = "int" if form == "int8" else "float"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False},
    }
    (path / "config.json").write_text(json.dumps(config))
    return read_artifact(path)


def scales_of(model: nn.Module, pattern: str, form: KvFormat) -> dict[str, Tensor]:
    """Scales for which TOKENS just fit."""
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    largest = kv_number_format(form).largest
    return {
        f"{pattern.format(n)}.{kind}": (states.abs().amax() / largest).reshape(1)
        for n, layer in enumerate(cache.layers)
        for kind, states in (("k_scale", layer.keys), ("v_scale", layer.values))
    }


class Reference(DynamicCache):
    """The same by transformers' own means: what is cached is rounded first."""

    def __init__(self, scales: dict[str, Tensor], pattern: str, form: KvFormat) -> None:
        super().__init__()
        self._how = (scales, pattern, kv_number_format(form))

    def update(  # type: ignore[override]
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scales, pattern, form = self._how
        name = pattern.format(layer)
        keys = round_inputs(keys, form, scales[f"{name}.k_scale"])
        values = round_inputs(values, form, scales[f"{name}.v_scale"])
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer, *args, **kwargs)
        return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_loaded_model_attends_to_rounded_keys_and_values(
    tmp_path: Path, family: str, form: KvFormat
) -> None:
    pattern = CONFIGS[family][0]
    plain = load_transformers(save(tmp_path, family), torch.float32, CPU)
    scales = scales_of(plain, pattern, form)
    rounded = load_transformers(with_cache_scheme(tmp_path, form, scales), torch.float32, CPU)
    found = rounded(TOKENS, use_cache=False).logits
    before = plain(TOKENS, use_cache=False).logits
    reference = Reference(scales, pattern, form)
    expected = plain(TOKENS, past_key_values=reference, use_cache=True).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    change = float((found - before).norm() / before.norm())
    assert 1e-3 < change < (0.02 if form == "int8" else 0.1)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_with_a_cache_it_computes_what_it_computes_without(tmp_path: Path, form: KvFormat) -> None:
    plain = load_transformers(save(tmp_path), torch.float32, CPU)
    scales = scales_of(plain, CONFIGS["llama"][0], form)
    model = load_transformers(with_cache_scheme(tmp_path, form, scales), torch.float32, CPU)
    whole = model(TOKENS, use_cache=False).logits[0]
    cache = DynamicCache()
    parts = [
        model(TOKENS[:, start:end], past_key_values=cache, use_cache=True).logits[0]
        for start, end in ((0, 20), (20, 21), (21, 27))
    ]
    off = (torch.cat(parts) - whole).abs()
    # Products of other shapes differ in their last bits, and a value next to a border of the grid
    # may fall on its other side; without rounding nearly all would be off.
    assert float((off > 1e-4).float().mean()) < 0.1 and float(off.max()) < 5e-3
    assert cache.get_seq_length() == 27
    made: Any = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    greedy = TOKENS
    for _ in range(4):
        last = model(greedy, use_cache=False).logits[:, -1:].argmax(-1)
        greedy = torch.cat((greedy, last), dim=1)
    assert torch.equal(made, greedy)


@torch.no_grad()
def test_an_old_checkpoint_names_modules_without_the_prefix(tmp_path: Path) -> None:
    plain = load_transformers(save(tmp_path, "gpt2"), torch.float32, CPU)
    before = plain(TOKENS).logits
    scales = scales_of(plain, "transformer.h.{}.attn", "int8")
    file = tmp_path / "model.safetensors"
    short = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    stored = {name.removeprefix("transformer."): t for name, t in scales.items()}
    model = load_transformers(with_cache_scheme(tmp_path, "int8", stored), torch.float32, CPU)
    found = model(TOKENS).logits
    round_kv(plain, scales, "int8")
    torch.testing.assert_close(found, plain(TOKENS).logits)
    assert not torch.allclose(found, before, atol=1e-4)


@torch.no_grad()
def test_a_scale_of_zero_does_no_harm(tmp_path: Path) -> None:
    model = load_transformers(save(tmp_path), torch.float32, CPU)
    for block in model.model.layers:
        block.self_attn.v_proj.weight.zero_()
    before = model(TOKENS).logits
    scales = scales_of(model, CONFIGS["llama"][0], "fp8")
    values = [name for name in scales if name.endswith("v_scale")]
    assert len(values) == 2 and all(float(scales[name]) == 0 for name in values)
    handles = round_kv(model, scales, "fp8")
    torch.testing.assert_close(model(TOKENS).logits, before)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(TOKENS).logits, before)


def test_scales_that_are_missing_or_stray_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    one, other = torch.ones(1), torch.ones(1)
    bare = with_cache_scheme(tmp_path, "fp8", {})
    with pytest.raises(ArtifactError, match="its KV cache is fp8, but has no scales"):
        load_transformers(bare, torch.float32, CPU)
    half = with_cache_scheme(tmp_path, "fp8", {"model.layers.0.self_attn.k_scale": one})
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.v_scale"):
        load_transformers(half, torch.float32, CPU)
    stray = {"model.layers.0.self_attn.v_scale": one, "model.layers.0.mlp.k_scale": other}
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.k_scale"):
        load_transformers(with_cache_scheme(tmp_path, "fp8", stray), torch.float32, CPU)


def test_a_module_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="takes no KV cache"):
        on_update(nn.Linear(2, 2), lambda keys, values: (keys, values))

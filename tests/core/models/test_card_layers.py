"""Norms and gates in the launch that rounds: the same decoder, to the last bit."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.quantized import pack
from infopt.core.layers.rounded import RoundedLinear
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.models.load import load_decoder
from infopt.core.models.mlp import GatedMLP, PlainMLP
from infopt.kernels.gemm.scratch import Scratch
from infopt.kernels.gpu.tile import H100, Card

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted
CPU = torch.device("cpu")
CARD = Card.with_shipped(**H100)
Tiny = Callable[[str], tuple[Artifact, Any]]
DYNAMIC = {"int8": ActivationFormat("int"), "float8": ActivationFormat("float")}
STATIC = ActivationFormat("int", strategy="tensor", dynamic=False)


def rounded(projection: Projection, form: ActivationFormat) -> Projection:
    """A dense projection in 8 bits, its inputs too, by the card's kernels."""
    from infopt.core.layers.card_products import card_product

    assert isinstance(projection, Linear)
    weight, bias = projection.weight.float(), projection.bias
    if form.kind == "float":
        packed = pack(
            to_fp8(weight, Fp8Format("channel")), bias, dtype=torch.float32, device=CPU,
            scratch=Scratch(),
        )  # fmt: skip
        assert packed is not None
        return card_product(CARD, RoundedLinear(packed, form))
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    static = None if form.dynamic else torch.tensor([0.05])
    return card_product(CARD, Int8Linear(codes, scales, form, bias, static))


def in_8_bits(decoder: Decoder, form: ActivationFormat) -> Decoder:
    def mlp(found: Any) -> Any:
        if isinstance(found, GatedMLP):
            wide, down = rounded(found.gate_up, form), rounded(found.down, form)
            return replace(found, gate_up=wide, down=down)
        assert isinstance(found, PlainMLP)
        return replace(found, up=rounded(found.up, form), down=rounded(found.down, form))

    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, qkv=rounded(layer.attention.qkv, form)),
            mlp=mlp(layer.mlp),
        )
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers)


def loaded(tiny: Tiny, kind: str, form: ActivationFormat) -> Decoder:
    from infopt.core.layers.card_products import CardChoice

    decoder = load_decoder(tiny(kind)[0], torch.float32, CPU, native=CardChoice(CARD), card=CARD)
    return in_8_bits(decoder, form)


def logits(decoder: Decoder) -> Tensor:
    from infopt.core.runtime.batch import Span, step_inputs
    from infopt.core.runtime.kv_cache import KVCache

    cache = KVCache.of(decoder, blocks=8, block_size=4, dtype=torch.float32)
    spans = [Span([5], 0, [0]), Span([7, 11, 3, 96, 2], 0, [3, 1])]
    inputs: StepInputs = step_inputs(spans, block_size=4, dtype=torch.float32, device=CPU)
    with torch.inference_mode():
        return decoder.logits(decoder(inputs, cache.layers))


@pytest.mark.parametrize("form", DYNAMIC)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama-biased-tied"])
def test_a_fused_decoder_is_the_same_to_the_last_bit(kind: str, form: str, tiny: Tiny) -> None:
    from infopt.core.layers.card_fused import Done, GatedProduct, NormedProduct
    from infopt.core.models.card_layers import with_rounding_fused

    plain = loaded(tiny, kind, DYNAMIC[form])
    fused = with_rounding_fused(plain)
    for layer in fused.layers:
        assert isinstance(layer.input_norm, Done) and isinstance(layer.mlp_norm, Done)
        assert isinstance(layer.attention.qkv, NormedProduct)
        assert isinstance(layer.mlp, GatedMLP)
        assert isinstance(layer.mlp.gate_up, NormedProduct)
        assert isinstance(layer.mlp.down, GatedProduct)
    assert torch.equal(logits(fused), logits(plain))
    assert fused.step_bytes == plain.step_bytes


def test_what_rounds_otherwise_stays_as_it_is(tiny: Tiny) -> None:
    from infopt.core.models.card_layers import with_rounding_fused

    static = loaded(tiny, "llama", STATIC)
    assert with_rounding_fused(static).layers == static.layers
    dense = load_decoder(tiny("llama")[0], torch.float32, CPU, card=CARD)
    assert with_rounding_fused(dense).layers == dense.layers


def test_a_norm_after_a_sum_stays_and_its_gate_does_not(tiny: Tiny) -> None:
    from infopt.core.layers.card_fused import Done
    from infopt.core.models.card_layers import with_rounding_fused

    plain = loaded(tiny, "llama", DYNAMIC["int8"])
    after = replace(plain, layers=tuple(replace(layer, norms_after=True) for layer in plain.layers))
    fused = with_rounding_fused(after)
    for one, other in zip(fused.layers, after.layers, strict=True):
        assert one.input_norm is other.input_norm and one.attention is other.attention
        assert isinstance(one.mlp, GatedMLP) and isinstance(one.mlp.gate, Done)
    assert torch.equal(logits(fused), logits(after))


def test_engines_load_it_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a card is found; whose rounding would differ, an unfused decoder being the same."""
    from infopt.core.models import card_layers
    from infopt.core.recipe.serve import EngineSettings
    from infopt.core.runtime import loaded as module

    called: list[Decoder] = []

    def fusing(decoder: Decoder) -> Decoder:
        called.append(decoder)
        return decoder

    monkeypatch.setattr(card_layers, "with_rounding_fused", fusing)
    settings, artifact = EngineSettings(), tiny("llama")[0]
    module.load_for(settings, artifact, torch.float32, CPU)
    assert not called
    monkeypatch.setattr(module, "find_card", lambda word, device: CARD)
    assert module.load_for(settings, artifact, torch.float32, CPU) is called[0]

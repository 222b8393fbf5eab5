"""Layers whose norms and gates are done in the launches that round the inputs of products.

Importing this imports Triton: only where a decoder has a card.
"""

from dataclasses import replace

from infopt.core.layers.card_fused import Done, together
from infopt.core.models.decoder import Decoder, DecoderLayer
from infopt.core.models.mlp import FeedForward, GatedMLP, PlainMLP


def with_rounding_fused(decoder: Decoder) -> Decoder:
    """The same decoder, to the last bit, with a launch less for each product of 8-bit inputs that
    a norm or a gate alone comes before: what they leave is never written in 16 bits."""
    return replace(decoder, layers=tuple(_fused(layer) for layer in decoder.layers))


def _fused(layer: DecoderLayer) -> DecoderLayer:
    layer = replace(layer, mlp=_fused_gate(layer.mlp))
    if layer.norms_after:  # what they leave is the stream itself
        return layer
    attention, mlp = layer.attention, layer.mlp
    if (qkv := together(layer.input_norm, attention.qkv)) is not None:
        layer = replace(layer, input_norm=Done(), attention=replace(attention, qkv=qkv))
    match mlp:
        case GatedMLP() if (wide := together(layer.mlp_norm, mlp.gate_up)) is not None:
            return replace(layer, mlp_norm=Done(), mlp=replace(mlp, gate_up=wide))
        case PlainMLP() if (wide := together(layer.mlp_norm, mlp.up)) is not None:
            return replace(layer, mlp_norm=Done(), mlp=replace(mlp, up=wide))
    return layer


def _fused_gate(mlp: FeedForward) -> FeedForward:
    if isinstance(mlp, GatedMLP) and (down := together(mlp.gate, mlp.down)) is not None:
        return replace(mlp, gate=Done(), down=down)
    return mlp

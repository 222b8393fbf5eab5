"""Build a decoder from an artifact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infopt.core.artifact.quantized import (
    input_scale,
    layer_scheme,
    linear_weight,
    stored_names,
)
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, StoredWeight
from infopt.core.layers.attention import Attention
from infopt.core.layers.embedding import Embedding
from infopt.core.layers.fuse import side_by_side
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.norm import HeadNorm, RMSNorm
from infopt.core.layers.quantized import pack
from infopt.core.layers.rotary import inverse_frequencies
from infopt.core.layers.rounded import RoundedLinear
from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import Decoder, DecoderLayer
from infopt.core.models.mlp import GatedMLP
from infopt.kernels.gemm.scratch import Scratch


def load_decoder(artifact: Artifact, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Read the weights, one layer at a time, into `dtype` on `device`.

    Layers that are stored quantized stay so in memory; inputs that the artifact says are quantized
    are rounded as it says, by a layer's own scale.
    Raises UnsupportedError for a model or rounding that the decoder does not know, ArtifactError
    for a tensor that is missing or of another shape than the config says.
    """
    return _Loader(artifact, dtype, device).decoder()


def runs_in_int8(scheme: LayerScheme | None) -> bool:
    """Whether a layer's weight and inputs are multiplied as 8-bit integers."""
    if scheme is None or scheme.activation is None:
        return False
    weight, inputs = scheme.weight, scheme.activation
    return (
        isinstance(weight, IntegerFormat)
        and weight.symmetric
        and weight.group_size is None
        and inputs.kind == "int"
        and inputs.bits <= 8
        and inputs.strategy in ("token", "tensor")
    )


def weight_bytes(artifact: Artifact, dtype: torch.dtype) -> int:
    """Bytes that the decoder's weights will take in memory, told by the files' headers.

    Of layers that stay packed, what is stored: the layouts in memory differ by little.
    """
    config = ModelConfig.from_hf(artifact.config)
    total = artifact.summary().parameters * dtype.itemsize
    for name, (outputs, inputs) in _linears(config).items():
        scheme = layer_scheme(artifact, name)
        if scheme is None:
            continue
        if runs_in_int8(scheme):
            held = outputs * (inputs + torch.float32.itemsize)
        else:
            stored = stored_names(artifact, f"{name}.weight")
            held = sum(artifact.headers[tensor].nbytes for tensor in stored)
        total += held - outputs * inputs * dtype.itemsize
    return total


def _linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shapes [out, in] of the linear layers."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    block = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    found = {
        f"model.layers.{n}.{part}": shape
        for n in range(config.layers)
        for part, shape in block.items()
    }
    return found | {"lm_head": (config.vocab_size, hidden)}


class _Loader:
    def __init__(self, artifact: Artifact, dtype: torch.dtype, device: torch.device) -> None:
        self.artifact = artifact
        self.config = ModelConfig.from_hf(artifact.config)
        self.dtype = dtype
        self.device = device
        self.shapes = _linears(self.config)
        self.scratch = Scratch()

    def decoder(self) -> Decoder:
        config = self.config
        table = (config.vocab_size, config.hidden_size)
        embedding = Embedding(self.tensor("model.embed_tokens.weight", table))
        if config.tied_embeddings:
            head: Projection = Linear(embedding.weight)
        else:
            head = self.linear("lm_head", bias=False)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return Decoder(
            config=config,
            embedding=embedding,
            layers=tuple(self.layer(f"model.layers.{n}") for n in range(config.layers)),
            norm=self.norm("model.norm"),
            head=head,
            frequencies=frequencies.to(self.device),
        )

    def layer(self, name: str) -> DecoderLayer:
        return DecoderLayer(
            input_norm=self.norm(f"{name}.input_layernorm"),
            attention=self.attention(f"{name}.self_attn"),
            mlp_norm=self.norm(f"{name}.post_attention_layernorm"),
            mlp=self.mlp(f"{name}.mlp"),
        )

    def attention(self, name: str) -> Attention:
        config = self.config
        parts = [
            self.linear(f"{name}.{part}", bias=config.qkv_bias)
            for part in ("q_proj", "k_proj", "v_proj")
        ]
        return Attention(
            qkv=side_by_side(parts),
            output=self.linear(f"{name}.o_proj", bias=config.output_bias),
            head_norm=self.head_norm(name) if config.qk_norm else None,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
        )

    def mlp(self, name: str) -> GatedMLP:
        gate, up, down = (
            self.linear(f"{name}.{part}", bias=self.config.mlp_bias)
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        return GatedMLP(side_by_side([gate, up]), down)

    def norm(self, name: str) -> RMSNorm:
        weight = self.tensor(f"{name}.weight", (self.config.hidden_size,))
        return RMSNorm(weight, self.config.norm_eps)

    def head_norm(self, name: str) -> HeadNorm:
        config = self.config
        query, key = (
            self.tensor(f"{name}.{part}.weight", (config.head_dim,))
            for part in ("q_norm", "k_norm")
        )
        weight = torch.cat((query.expand(config.heads, -1), key.expand(config.kv_heads, -1)))
        return HeadNorm(weight, config.norm_eps)

    def linear(self, name: str, *, bias: bool) -> Projection:
        shape = self.shapes[name]
        scheme = layer_scheme(self.artifact, name)
        weight = linear_weight(self.artifact, name)
        offset = self.tensor(f"{name}.bias", shape[:1]) if bias else None
        activation = scheme.activation if scheme is not None else None
        if activation is None:
            return self.held(name, weight, offset)
        self.check_rounding(name, activation)
        scale = input_scale(self.artifact, name)
        scale = None if scale is None else scale.to(self.device, torch.float32)
        if isinstance(weight, QuantizedWeight) and runs_in_int8(scheme):
            self.check_shape(f"{name}.weight", weight.codes, shape)
            codes = (weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)).to(torch.int8)
            scales = weight.scales.squeeze(1).to(self.device, torch.float32)
            return Int8Linear(codes.to(self.device), scales, activation, offset, scale)
        return RoundedLinear(self.held(name, weight, offset), activation, scale)

    def held(self, name: str, weight: Tensor | StoredWeight, bias: Tensor | None) -> Projection:
        """A linear layer packed as it is stored, where it is stored so, else dense."""
        shape = self.shapes[name]
        if isinstance(weight, Tensor):
            return Linear(self.checked(f"{name}.weight", weight, shape), bias)
        self.check_shape(f"{name}.weight", weight.codes, shape)
        packed = pack(weight, bias, dtype=self.dtype, device=self.device, scratch=self.scratch)
        if packed is not None:
            return packed
        return Linear(weight.dequantize().to(device=self.device, dtype=self.dtype), bias)

    def check_rounding(self, name: str, activation: ActivationFormat) -> None:
        if activation.dynamic and activation.strategy == "tensor":
            raise UnsupportedError(
                f"{self.artifact.path}: the inputs of {name} are rounded with one scale for a "
                "whole batch: what a request is answered would depend on the others",
                "quantize with a scale per token or a static one; infopt evaluate runs it as it is",
            )

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.checked(name, self.artifact.tensor(name), shape)

    def checked(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        self.check_shape(name, tensor, shape)
        return tensor.to(device=self.device, dtype=self.dtype)

    def check_shape(self, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
        if tensor.shape != torch.Size(shape):
            raise ArtifactError(
                f"{self.artifact.path}: {name} is {list(tensor.shape)}, "
                f"but config.json says {list(shape)}"
            )

"""Build a decoder from an artifact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError
from infopt.core.formats.number import QuantizedWeight
from infopt.core.layers.attention import Attention
from infopt.core.layers.embedding import Embedding
from infopt.core.layers.linear import Linear, fused
from infopt.core.layers.norm import HeadNorm, RMSNorm
from infopt.core.layers.rotary import inverse_frequencies
from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import Decoder, DecoderLayer
from infopt.core.models.mlp import GatedMLP


def load_decoder(artifact: Artifact, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Read the weights, one layer at a time, into `dtype` on `device`.

    Raises UnsupportedError for a model the decoder does not know, ArtifactError for a tensor that
    is missing or of another shape than the config says.
    """
    return _Loader(artifact, dtype, device).decoder()


class _Loader:
    def __init__(self, artifact: Artifact, dtype: torch.dtype, device: torch.device) -> None:
        self.artifact = artifact
        self.config = ModelConfig.from_hf(artifact.config)
        self.dtype = dtype
        self.device = device

    def decoder(self) -> Decoder:
        config = self.config
        table = (config.vocab_size, config.hidden_size)
        embedding = Embedding(self.tensor("model.embed_tokens.weight", table))
        if config.tied_embeddings:
            head = Linear(embedding.weight)
        else:
            head = self.linear("lm_head", *table, bias=False)
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
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        widths = {"q_proj": query, "k_proj": key, "v_proj": key}
        parts = [
            self.linear(f"{name}.{part}", width, config.hidden_size, bias=config.qkv_bias)
            for part, width in widths.items()
        ]
        return Attention(
            qkv=fused(parts),
            output=self.linear(
                f"{name}.o_proj", config.hidden_size, query, bias=config.output_bias
            ),
            head_norm=self.head_norm(name) if config.qk_norm else None,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
        )

    def mlp(self, name: str) -> GatedMLP:
        wide, hidden, bias = (
            self.config.intermediate_size,
            self.config.hidden_size,
            self.config.mlp_bias,
        )
        gate = self.linear(f"{name}.gate_proj", wide, hidden, bias=bias)
        up = self.linear(f"{name}.up_proj", wide, hidden, bias=bias)
        return GatedMLP(
            fused([gate, up]), self.linear(f"{name}.down_proj", hidden, wide, bias=bias)
        )

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

    def linear(self, name: str, out: int, into: int, *, bias: bool) -> Linear:
        return Linear(
            self.linear_weight(name, (out, into)),
            self.tensor(f"{name}.bias", (out,)) if bias else None,
        )

    def linear_weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The weight of a linear [out, in], made dense if it is stored quantized."""
        weight = linear_weight(self.artifact, name)
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize()
        return self.checked(f"{name}.weight", weight, shape)

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.checked(name, self.artifact.tensor(name), shape)

    def checked(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        if tensor.shape != torch.Size(shape):
            raise ArtifactError(
                f"{self.artifact.path}: {name} is {list(tensor.shape)}, "
                f"but config.json says {list(shape)}"
            )
        return tensor.to(device=self.device, dtype=self.dtype)

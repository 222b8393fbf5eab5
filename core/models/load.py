"""Build a decoder from an artifact."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infopt.core.artifact.quantized import (
    input_scale,
    kv_format,
    layer_scheme,
    linear_weight,
)
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import QuantizedWeight
from infopt.core.formats.scheme import StoredWeight
from infopt.core.layers.attention import Attention
from infopt.core.layers.choice import Choice
from infopt.core.layers.embedding import Embedding, Table
from infopt.core.layers.fuse import side_by_side
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.native import NativeEmbedding, NativeLinear
from infopt.core.layers.norm import HeadNorm, LayerNorm, Norm, RMSNorm
from infopt.core.layers.quantized import pack
from infopt.core.layers.rotary import inverse_frequencies
from infopt.core.layers.rounded import RoundedLinear
from infopt.core.models.config import Experts, ModelConfig
from infopt.core.models.decoder import Decoder, DecoderLayer, RotaryTable
from infopt.core.models.families import Part
from infopt.core.models.kept_weights import KeptWeights
from infopt.core.models.mlp import (
    Activate,
    ExpertsMLP,
    FeedForward,
    Gate,
    GatedMLP,
    PlainMLP,
    activate,
    by_row,
)
from infopt.core.models.rope import Rope
from infopt.core.models.shapes import linear_shapes, takes_heads
from infopt.core.models.stored import runs_in_int8, stored_name
from infopt.kernels.attention.eight_bits import FP8, INT8, KvScales
from infopt.kernels.gemm.scratch import Scratch
from infopt.kernels.gpu.tile import Card

# What stacked experts are called, whatever they are called apart.
_STACKED = ("gate_up_proj", "down_proj")


def load_decoder(
    artifact: Artifact,
    dtype: torch.dtype,
    device: torch.device,
    *,
    deterministic: bool = False,
    native: Choice | None = None,
    card: Card | None = None,
    kept: KeptWeights | None = None,
) -> Decoder:
    """Read the weights, one layer at a time, into `dtype` on `device`.

    `deterministic`: what is computed of a token does not depend, by a single bit, on the other
    tokens of its step, nor on how its sequence was cut into steps. `native`: which projections
    become native ones; none by default. `card`: the GPU whose kernels do attention, where they can.
    `kept`: native projections of an earlier load, and where those of this one are kept.

    Layers that are stored quantized stay so in memory; inputs that the artifact says are quantized
    are rounded as it says, by a layer's own scale.
    Raises UnsupportedError for a model or rounding that the decoder does not know, ArtifactError
    for a tensor that is missing or of another shape than the config says.
    """
    loader = _Loader(artifact, dtype, device, deterministic, native, card, kept)
    decoder = loader.decoder()
    if native is not None:
        native.keep()
    if kept is not None:
        kept.keep()
    return decoder


class _Loader:
    def __init__(
        self,
        artifact: Artifact,
        dtype: torch.dtype,
        device: torch.device,
        fixed: bool,
        native: Choice | None,
        card: Card | None,
        kept: KeptWeights | None,
    ) -> None:
        self.fixed = fixed
        self.native = native
        self.kept = kept
        self.artifact = artifact
        self.config = ModelConfig.from_hf(artifact.config)
        self.card = card if card is not None and takes_heads(self.config) else None
        self.names = self.config.names
        self.dtype = dtype
        self.device = device
        self.shapes = linear_shapes(self.config)
        self.scratch = Scratch()
        self.kv_format = kv_format(artifact)

    def decoder(self) -> Decoder:
        config, names = self.config, self.names
        head, embedding = self.tables()
        projected = config.embedding_size != config.hidden_size
        return Decoder(
            config=config,
            embedding=embedding,
            layers=tuple(self.layer(n) for n in range(config.layers)),
            norm=self.norm(names.norm) if config.final_norm else None,
            head=head,
            rotaries=tuple(
                self.rotary(rope) for rope in (config.rope, config.local_rope) if rope is not None
            ),
            positions=self.positions() if config.rope is None else None,
            project_in=self.settled(names.project_in) if projected else None,
            project_out=self.settled(names.project_out) if projected else None,
            card=self.card,
        )

    def tables(self) -> tuple[Projection, Table]:
        """The head, and the embeddings; where they are tied, in memory once."""
        config, names = self.config, self.names
        if not config.tied_embeddings:
            return self.settled(names.head), self.embedding()
        shape = (config.vocab_size, config.embedding_size)
        made: list[Embedding] = []

        def dense() -> Linear:
            made.append(self.embedding())
            return Linear(made[0].weight, fixed=self.fixed)

        head = self.last_form(names.embedding, shape, dense)
        if isinstance(head, NativeLinear):
            return head, NativeEmbedding(head.native, head.weight, self.embedding_scale())
        return head, made[0] if made else self.embedding()

    def last_form(
        self, name: str, shape: tuple[int, int], made: Callable[[], Projection]
    ) -> Projection:
        """A projection as it was kept, else made now and in its last form."""
        if self.native is None:
            return made()
        found = None if self.kept is None else self.kept.find(name, shape)
        if found is None:
            found = self.native.settle(made())
            if self.kept is not None:
                self.kept.put(name, found)
        return found

    def settled(self, name: str, part: Part | None = None) -> Projection:
        """A layer that no other will join."""
        return self.last_form(name, self.shapes[name], lambda: self.linear(name, part))

    def joined(self, names: Sequence[str], part: Part | None = None) -> Projection:
        """Layers of the same input as one."""
        shape = (sum(self.shapes[name][0] for name in names), self.shapes[names[0]][1])
        return self.last_form(
            " ".join(names),
            shape,
            lambda: side_by_side([self.linear(name, part) for name in names]),
        )

    def embedding_scale(self) -> float:
        """Rounded as transformers rounds it, so that both embed alike."""
        return float(torch.tensor(self.config.embedding_scale).to(self.dtype).item())

    def embedding(self) -> Embedding:
        shape = (self.config.vocab_size, self.config.embedding_size)
        weight = self.tensor(f"{self.names.embedding}.weight", shape)
        return Embedding(weight, self.embedding_scale())

    def positions(self) -> Embedding:
        config, first = self.config, self.config.position_offset
        shape = (config.max_positions + first, config.hidden_size)
        return Embedding(self.tensor(f"{self.names.positions}.weight", shape)[first:])

    def rotary(self, rope: Rope) -> RotaryTable:
        frequencies = inverse_frequencies(rope.dim, rope.theta, rope.scaling)
        magnitude = rope.scaling.attention_factor if rope.scaling is not None else 1.0
        return RotaryTable(frequencies.to(self.device), magnitude)

    def layer(self, index: int) -> DecoderLayer:
        names, name = self.names, f"{self.names.layer}.{index}"
        outer = [
            self.norm(f"{name}.{norm}") if norm else None
            for norm in (names.attention_norm, names.mlp_out_norm)
        ]
        return DecoderLayer(
            input_norm=self.norm(f"{name}.{names.input_norm}"),
            attention=self.attention(name, self.config.windows[index]),
            mlp_norm=self.norm(f"{name}.{names.mlp_norm}"),
            mlp=self.mlp(name, index),
            attention_out_norm=outer[0],
            mlp_out_norm=outer[1],
            norms_after=self.config.norms_after,
        )

    def attention(self, name: str, window: int | None) -> Attention:
        config, names = self.config, self.names
        rotary = None if config.rope is None else 0
        if config.local_rope is not None and window is not None:
            rotary = 1
        return Attention(
            qkv=self.joined([f"{name}.{part}" for part in names.qkv], "qkv"),
            output=self.settled(f"{name}.{names.output}", "output"),
            head_norm=self.head_norm(name) if config.qk_norm else None,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            scale=config.query_scale,
            rotary=rotary,
            window=window,
            cap=config.attention_cap,
            kv_scales=self.kv_scales(name),
            fixed=self.fixed,
        )

    def kv_scales(self, name: str) -> KvScales | None:
        """Of the layer `name`, where the artifact says how its keys and values are to be cached."""
        if self.kv_format is None:
            return None
        attention = f"{name}.{self.names.output.rpartition('.')[0]}"
        found = []
        for kind in ("k_scale", "v_scale"):
            stored = f"{attention}.{kind}"
            if not self.artifact.has(stored):
                stored = stored.partition(".")[2]
            scale = self.artifact.tensor(stored)
            if scale.numel() != 1:
                raise ArtifactError(f"{self.artifact.path}: {stored} has {scale.numel()} values")
            found.append(scale.reshape(1, 1).float().expand(self.config.kv_heads, 1))
        storage = {"int8": INT8, "fp8": FP8}[self.kv_format]
        return KvScales(storage, torch.cat(found).to(self.device))

    def mlp(self, name: str, index: int) -> FeedForward:
        config, names = self.config, self.names
        if config.experts is not None and config.experts.layers[index]:
            return self.experts(name, config.experts)
        wide = self.joined([f"{name}.{part}" for part in names.wide], "mlp")
        down = self.settled(f"{name}.{names.down}", "mlp")
        if config.gated:
            return GatedMLP(wide, down, self.gate())
        return PlainMLP(wide, down, self.activation())

    def gate(self) -> Activate:
        found = None if self.native is None else self.native.gate(self.config.activation)
        return found or Gate(self.activation())

    def activation(self) -> Activate:
        activation = activate(self.config.activation)
        return by_row(activation) if self.fixed else activation

    def experts(self, name: str, experts: Experts) -> ExpertsMLP:
        owner = f"{name}.{self.names.experts}"
        stacked = self.artifact.has(stored_name(self.artifact, f"{owner}.{_STACKED[0]}"))
        found = self.stacked(owner, experts) if stacked else self.apart(owner, experts)
        router = self.settled(f"{name}.{self.names.router}")
        return ExpertsMLP(router, found, experts.per_token, experts.normalized)

    def stacked(self, owner: str, experts: Experts) -> tuple[GatedMLP, ...]:
        hidden, inner = self.config.hidden_size, experts.intermediate_size
        wide = self.tensor(f"{owner}.{_STACKED[0]}", (experts.count, 2 * inner, hidden))
        down = self.tensor(f"{owner}.{_STACKED[1]}", (experts.count, hidden, inner))
        gate = Gate(self.activation())
        return tuple(
            GatedMLP(
                self.stack_part(f"{owner} {_STACKED[0]} {e}", wide[e]),
                self.stack_part(f"{owner} {_STACKED[1]} {e}", down[e]),
                gate,
            )
            for e in range(experts.count)
        )

    def stack_part(self, name: str, weight: Tensor) -> Projection:
        shape = (weight.shape[0], weight.shape[1])
        return self.last_form(name, shape, lambda: Linear(weight, fixed=self.fixed))

    def apart(self, owner: str, experts: Experts) -> tuple[GatedMLP, ...]:
        gate, up, down = self.names.expert
        gating = self.gate()
        return tuple(
            GatedMLP(
                self.joined([f"{owner}.{e}.{part}" for part in (gate, up)]),
                self.settled(f"{owner}.{e}.{down}"),
                gating,
            )
            for e in range(experts.count)
        )

    def norm(self, name: str) -> Norm:
        config, shape = self.config, (self.config.hidden_size,)
        if config.norm == "layer":
            weight, bias = (self.tensor(f"{name}.{part}", shape) for part in ("weight", "bias"))
            return LayerNorm(weight, bias, config.norm_eps)
        norm = RMSNorm(self.norm_weight(f"{name}.weight", shape), config.norm_eps)
        return norm if self.native is None else self.native.norm(norm)

    def head_norm(self, name: str) -> HeadNorm:
        config, names = self.config, self.names
        query, key = (
            self.norm_weight(f"{name}.{part}.weight", (config.head_dim,))
            for part in (names.query_norm, names.key_norm)
        )
        weight = torch.cat((query.expand(config.heads, -1), key.expand(config.kv_heads, -1)))
        return HeadNorm(weight, config.norm_eps)

    def norm_weight(self, name: str, shape: Sequence[int]) -> Tensor:
        """With an offset in float32: near 1, 16 bits would not hold what was learned."""
        if not self.config.norm_offset:
            return self.tensor(name, shape)
        return self.stored(name, shape).to(self.device, torch.float32) + self.config.norm_offset

    def linear(self, name: str, part: Part | None = None) -> Projection:
        """The layer `name`, with a bias where the config says that this part of a block has one."""
        shape = self.shapes[name]
        has_bias = part is not None and part in self.config.biases
        bias = self.tensor(f"{name}.bias", shape[:1]) if has_bias else None
        name = stored_name(self.artifact, f"{name}.weight").removesuffix(".weight")
        scheme = layer_scheme(self.artifact, name)
        weight = linear_weight(self.artifact, name)
        activation = scheme.activation if scheme is not None else None
        if activation is None:
            return self.held(name, weight, bias, shape)
        self.check_rounding(name, activation)
        scale = input_scale(self.artifact, name)
        scale = None if scale is None else scale.to(self.device, torch.float32)
        if isinstance(weight, QuantizedWeight) and runs_in_int8(scheme):
            self.check_shape(f"{name}.weight", weight.codes, shape)
            codes = (weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)).to(torch.int8)
            scales = weight.scales.squeeze(1).to(self.device, torch.float32)
            return Int8Linear(codes.to(self.device), scales, activation, bias, scale, self.fixed)
        return RoundedLinear(self.held(name, weight, bias, shape), activation, scale)

    def held(
        self,
        name: str,
        weight: Tensor | StoredWeight,
        bias: Tensor | None,
        shape: tuple[int, int],
    ) -> Projection:
        """A linear layer packed as it is stored, where it is stored so, else dense."""
        if isinstance(weight, Tensor):
            turned = self.config.transposed and name != self.names.head
            value = weight.t() if turned else weight
            dense = self.checked(f"{name}.weight", value, shape).contiguous()
            return Linear(dense, bias, self.fixed)
        self.check_shape(f"{name}.weight", weight.codes, shape)
        packed = pack(
            weight,
            bias,
            dtype=self.dtype,
            device=self.device,
            scratch=self.scratch,
            fixed=self.fixed,
            by_rows=self.native is not None,
        )
        if packed is not None:
            return packed
        dense = weight.dequantize().to(device=self.device, dtype=self.dtype)
        return Linear(dense, bias, self.fixed)

    def check_rounding(self, name: str, activation: ActivationFormat) -> None:
        if activation.dynamic and activation.strategy == "tensor":
            raise UnsupportedError(
                f"{self.artifact.path}: the inputs of {name} are rounded with one scale for a "
                "whole batch: what a request is answered would depend on the others",
                "quantize with a scale per token or a static one; infopt evaluate runs it as it is",
            )

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.stored(name, shape).to(device=self.device, dtype=self.dtype)

    def stored(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self.artifact.tensor(stored_name(self.artifact, name))
        self.check_shape(name, found, shape)
        return found

    def checked(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        self.check_shape(name, tensor, shape)
        return tensor.to(device=self.device, dtype=self.dtype)

    def check_shape(self, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
        if tensor.shape != torch.Size(shape):
            raise ArtifactError(
                f"{self.artifact.path}: {name} is {list(tensor.shape)}, "
                f"but config.json says {list(shape)}"
            )

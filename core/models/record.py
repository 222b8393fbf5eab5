"""A decoder's forward pass, recorded: the same pass, its parts replaced by ones that append calls.

Every part that is called computes nothing, but appends a native op to a program and returns the
buffer that the op will fill; views of it are tensors as ever.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from infopt.core.layers.attention import Attending, Attention
from infopt.core.layers.embedding import Embedding, Table
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.linear import Given, Linear, Projection
from infopt.core.layers.native import NativeEmbedding, NativeGroups, NativeInt8, NativeLinear
from infopt.core.layers.norm import LayerNorm, Norm, RMSNorm
from infopt.core.models.config import Activation
from infopt.core.models.decoder import Decoder, DecoderLayer
from infopt.core.models.mlp import FeedForward, GatedMLP, PlainMLP
from infopt.kernels.attention.eight_bits import FP8
from infopt.kernels.attention.scores import Scores
from infopt.kernels.cpu import attention, elementwise, packed, unpacked
from infopt.kernels.cpu.attention import Heads, Scratch
from infopt.kernels.cpu.dense import DensePanels
from infopt.kernels.cpu.groups8 import groups8
from infopt.kernels.cpu.program import KINDS, Count, Program

Part = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor | None], Tensor]


class Unrecordable(Exception):
    """A part of a decoder that native ops cannot compute; says which."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a recorded step has room for."""

    rows: int
    wanted: int
    """Rows whose logits are wanted."""
    alone: int
    """Rows that attention takes by themselves."""
    width: int
    """Blocks of a request."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a recorded step reads: one token a row, those of a request behind one another."""

    token_ids: Tensor
    """int64 [rows]"""
    positions: Tensor
    """int64 [rows]"""
    slots: Tensor
    """int64 [rows]"""
    owners: Tensor
    """int32 [rows]: the number of each row's request."""
    tables: Tensor
    """int32 [rows, width]: the blocks of each request."""

    wanted: Tensor
    """int64 [wanted]: the rows whose logits are wanted."""

    @classmethod
    def empty(cls, size: "Size") -> "Rows":
        numbers = torch.zeros(3, size.rows, dtype=torch.int64)
        owners = torch.arange(size.rows, dtype=torch.int32)
        tables = torch.zeros(size.rows, size.width, dtype=torch.int32)
        wanted = torch.zeros(size.wanted, dtype=torch.int64)
        return cls(numbers[0], numbers[1], numbers[2], owners, tables, wanted)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a program leaves, in float32."""

    hidden: Tensor
    """[rows, hidden], before the last norm."""
    logits: Tensor
    """[wanted, vocabulary]"""
    wanted: Count
    """How many rows are wanted."""
    packed: bool
    """Whether all weights lie as products of many rows want them."""


def record(
    decoder: Decoder, program: Program, size: Size, rows: Rows, caches: Sequence[Tensor]
) -> Recorded:
    """Append to `program` the step that reads `rows` and fills `caches`.

    Raises Unrecordable for a decoder with a part that has no native op.
    """
    recorder = _Recorder(decoder, program, size, rows, caches)
    twin = recorder.twin()
    hidden = twin.through(twin.embed(rows), recorder, caches)
    chosen, wanted = recorder.choose(hidden)
    return Recorded(hidden, twin.logits(chosen), wanted, recorder.packed)


def product(
    program: Program, part: Projection, dtype: torch.dtype, label: str
) -> tuple[int, Product]:
    """How many outputs a projection has, and what appends it, into columns of a buffer or not.

    `dtype` is what inputs are rounded to. Raises Unrecordable, with the label.
    """
    match part:
        case NativeLinear(weight=dense, bias=bias):
            return dense.outputs, lambda x, y: packed.dense(program, x, dense, bias, y)
        case NativeGroups(weight=groups, bias=bias, columns=order, rounds=rounds):

            def append(x: Tensor, y: Tensor | None) -> Tensor:
                x = x if order is None else packed.columns(program, x, order)
                if rounds:
                    return groups8(program, x, groups, bias, y)
                return packed.groups(program, x, groups, bias, y, dtype=dtype)

            return groups.outputs, append
        case NativeInt8(weight=codes, grid=grid, bias=bias):
            outputs = codes.shape[0]
            return outputs, lambda x, y: packed.int8(program, x, codes, grid, bias, y)
        case Linear(weight=weight, bias=bias, fixed=False) if unpacked.takes(weight):
            outputs = weight.shape[0]
            return outputs, lambda x, y: unpacked.unpacked(program, x, weight, bias, y)
        case Given(output=output):
            held = output[: program.capacity].float()
            return held.shape[1], lambda x, y: held
        case _:
            raise Unrecordable(f"its {label} is held as {type(part).__name__}")


def _rounds(part: Projection) -> bool:
    """Whether a projection reads the copy in bfloat16 of what it is given, and nothing else."""
    return isinstance(part, NativeLinear) and part.weight.panels.dtype == torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A layer that says which it is, so that what its calls take can be told."""

    number: int
    layer: DecoderLayer
    program: Program

    def __call__(self, x: Tensor, inputs: Attending, cache: Tensor) -> Tensor:
        self.program.layer = self.number
        return self.layer(x, inputs, cache)


class _Recorder:
    """The parts that append; and what all layers' attention is handed (`Attending`)."""

    def __init__(
        self,
        decoder: Decoder,
        program: Program,
        size: Size,
        rows: Rows,
        caches: Sequence[Tensor],
    ) -> None:
        self.decoder, self.program, self.rows, self.size = decoder, program, rows, size
        self.packed = True
        config, cache = decoder.config, caches[0]
        if decoder.device.type != "cpu":
            raise Unrecordable(f"it runs on {decoder.device.type}")
        if cache.dtype == FP8 or cache.dtype == torch.float16:
            raise Unrecordable(f"its cache is kept in {cache.dtype}")
        if config.head_dim > attention.MOST_DIM:
            raise Unrecordable(f"its heads are {config.head_dim} wide")
        self.shape = Heads(config.heads, config.kv_heads, config.head_dim)
        context = size.width * cache.shape[1]
        self.scratch: Scratch = attention.new_scratch(size.alone, self.shape, context)
        self._rotaries: list[tuple[Tensor, Tensor]] = []
        self._sum: tuple[Tensor, Tensor] | None = None
        """A sum still to be appended: a norm of it does both in one."""

    def twin(self) -> Decoder:
        """The decoder with parts that append; rotations of all layers are appended here."""
        decoder, program = self.decoder, self.program
        program.label = "attention"
        self._rotaries = [
            elementwise.angles(program, self.rows.positions, table.frequencies, table.magnitude)
            for table in decoder.rotaries
        ]
        return replace(
            decoder,
            embedding=self.table(decoder.embedding, "embedding"),
            layers=tuple(
                cast(DecoderLayer, _Numbered(n, self.layer(layer), program))
                for n, layer in enumerate(decoder.layers)
            ),
            norm=self.norm(decoder.norm),
            head=self.projection(decoder.head, "lm_head"),
            positions=None
            if decoder.positions is None
            else self.table(decoder.positions, "positions"),
            project_in=self.projection(decoder.project_in, "project_in"),
            project_out=self.projection(decoder.project_out, "project_out"),
            add=self.add,
            cap=self.cap,
        )

    def layer(self, layer: DecoderLayer) -> DecoderLayer:
        if layer.attention.fixed:
            raise Unrecordable("it is deterministic: what it computes must be torch's throughout")
        return replace(
            layer,
            input_norm=self.norm(layer.input_norm),
            attention=replace(
                layer.attention,
                qkv=self.projection(layer.attention.qkv, "qkv"),
                output=self.projection(layer.attention.output, "o"),
            ),
            mlp_norm=self.norm(layer.mlp_norm),
            mlp=self.mlp(layer.mlp),
            attention_out_norm=self.norm(layer.attention_out_norm),
            mlp_out_norm=self.norm(layer.mlp_out_norm),
            add=self.add,
        )

    def mlp(self, mlp: FeedForward) -> FeedForward:
        curve = self.decoder.config.activation
        match mlp:
            case GatedMLP(gate_up=NativeLinear(weight=both, bias=None)) if packed.takes_gates(
                self.program, both
            ):
                return replace(
                    mlp,
                    gate_up=cast(Any, lambda x: x),
                    down=self.projection(mlp.down, "down"),
                    gate=self.gated(both, curve, keeps=not _rounds(mlp.down)),
                )
            case GatedMLP():
                return replace(
                    mlp,
                    gate_up=self.projection(mlp.gate_up, "gate_up"),
                    down=self.projection(mlp.down, "down"),
                    gate=self.gate(curve, gated=True),
                )
            case PlainMLP():
                return replace(
                    mlp,
                    up=self.projection(mlp.up, "gate_up"),
                    down=self.projection(mlp.down, "down"),
                    activation=self.gate(curve, gated=False),
                )
            case _:
                raise Unrecordable(f"it has a layer of {type(mlp).__name__}")

    def choose(self, hidden: Tensor) -> tuple[Tensor, Count]:
        """The wanted rows, and how many they are: all that is appended from here on is of those."""
        program = self._label("chosen")
        program.layer = None
        program.count = wanted = Count(self.size.wanted)
        return elementwise.embed(program, self.rows.wanted, hidden), wanted

    # The parts. Each first sees to a sum that is still to be appended.

    def _label(self, label: str) -> Program:
        if self._sum is not None:
            x, added = self._sum
            self._sum, self.program.label = None, "norms"
            elementwise.add(self.program, x, added)
        self.program.label = label
        return self.program

    def table(self, part: Table, label: str) -> Any:
        match part:
            case Embedding(weight=weight, scale=scale) if weight.dtype in KINDS:

                def rows(ids: Tensor) -> Tensor:
                    return elementwise.embed(self._label(label), ids, weight, scale)

                return rows
            case NativeEmbedding(weight=panels, scale=scale):

                def packed_rows(ids: Tensor) -> Tensor:
                    x = packed.packed_embed(self._label(label), ids, panels)
                    if scale == 1.0:
                        return x
                    every = torch.arange(len(x))
                    return elementwise.embed(self._label(f"{label}, scaled"), every, x, scale)

                return packed_rows
            case _:
                raise Unrecordable(f"its {label} are held as {type(part).__name__}")

    def projection(self, part: Projection | None, label: str) -> Any:
        if part is None:
            return None
        parts = part.parts if isinstance(part, SideBySide) else (part,)
        self.packed = self.packed and not any(isinstance(each, Linear) for each in parts)
        products = [product(self.program, each, self.decoder.dtype, label) for each in parts]

        def project(x: Tensor) -> Tensor:
            program = self._label(label)
            if len(products) == 1:
                return products[0][1](x, None)
            ends = list(accumulate(width for width, _ in products))
            y = program.buffer(ends[-1])
            for (width, append), end in zip(products, ends, strict=True):
                append(x, y[:, end - width : end])
            return y

        return project

    def norm(self, part: Norm | None) -> Any:
        match part:
            case None:
                return None
            case RMSNorm(weight=weight, eps=eps):
                bias = None
            case LayerNorm(weight=weight, bias=bias, eps=eps):
                pass
            case _:
                raise Unrecordable(f"it has a {type(part).__name__}")

        def norm(x: Tensor) -> Tensor:
            added = None
            if self._sum is not None and self._sum[0] is x:
                added, self._sum = self._sum[1], None
            return elementwise.norm(self._label("norms"), x, weight, bias, eps, added)

        return norm

    def add(self, x: Tensor, added: Tensor) -> Tensor:
        self._label("norms")
        self._sum = (x, added)
        return x

    def gate(self, curve: Activation, *, gated: bool) -> Part:
        def gate(x: Tensor) -> Tensor:
            return elementwise.gate(self._label("activation"), x, curve, gated)

        return gate

    def gated(self, weight: DensePanels, curve: Activation, *, keeps: bool) -> Part:
        def gated(x: Tensor) -> Tensor:
            return packed.gated(self._label("gate_up"), x, weight, curve, keeps=keeps)

        return gated

    def cap(self, logits: Tensor, cap: float) -> Tensor:
        elementwise.cap(self._label("lm_head"), logits, cap)
        return logits

    def attend(self, layer: Attention, qkv: Tensor, cache: Tensor) -> Tensor:
        program, norm = self._label("attention"), layer.head_norm
        attention.rotate_and_cache(
            program,
            qkv,
            self.rows.slots,
            cache,
            self.shape,
            rotary=None if layer.rotary is None else self._rotaries[layer.rotary],
            norm=None if norm is None else (norm.weight, norm.eps),
            scales=layer.kv_scales,
        )
        return attention.attend(
            program,
            qkv,
            cache,
            self.rows.positions,
            self.rows.owners,
            self.rows.tables,
            self.shape,
            Scores(layer.scale, layer.window, layer.cap),
            self.scratch,
        )

"""Where a step's time goes: each operator of a decoder timed as the runtime calls it."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import torch

from infopt.core.models.decoder import Decoder, DecoderLayer
from infopt.core.models.mlp import FeedForward, GatedMLP, PlainMLP

_ATTENTION, _MLP = "attention, projections included", "mlp, projections included"


@dataclass(slots=True)
class Clock:
    """Seconds by operator, summed over the layers, and by layer."""

    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    layers: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=dict)
    """Of weights, as the runtime holds them."""

    def reset(self) -> None:
        self.operators.clear()
        self.layers.clear()

    def split(self) -> dict[str, float]:
        """Seconds by operator, those within others taken out of them."""
        found = dict(self.operators)
        attention, mlp = found.pop(_ATTENTION, 0.0), found.pop(_MLP, 0.0)
        found["attention"] = attention - found.get("qkv", 0.0) - found.get("o", 0.0)
        inner = found.get("gate_up", 0.0) + found.get("down", 0.0)
        if mlp:
            found["activation"] = mlp - inner
        return found


class _Timed:
    """A part of the decoder that adds what its calls took to a clock; all else is the part's."""

    def __init__(self, part: Any, clock: Clock, operator: str, layer: int | None = None) -> None:
        self._part, self._clock, self._operator, self._layer = part, clock, operator, layer

    def __call__(self, x: Any, *further: Any) -> Any:
        started = perf_counter()
        result = self._part(x, *further)
        if result.device.type == "cuda":
            torch.cuda.synchronize(result.device)
        took = perf_counter() - started
        self._clock.operators[self._operator] += took
        if self._layer is not None:
            self._clock.layers[self._layer] += took
        return result

    @property
    def nbytes(self) -> int:
        return int(self._part.nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def timed(decoder: Decoder, clock: Clock) -> Decoder:
    """The same decoder, which tells `clock` what each operator takes; on a GPU it waits for each,
    so that the whole takes longer."""
    clock.bytes = operator_bytes(decoder)

    def whole(part: Any, operator: str) -> Any:
        return None if part is None else _Timed(part, clock, operator)

    return replace(
        decoder,
        embedding=whole(decoder.embedding, "embedding"),
        layers=tuple(_layer(layer, clock, n) for n, layer in enumerate(decoder.layers)),
        norm=whole(decoder.norm, "norms"),
        head=whole(decoder.head, "lm_head"),
        positions=whole(decoder.positions, "embedding"),
        project_in=whole(decoder.project_in, "projections"),
        project_out=whole(decoder.project_out, "projections"),
    )


def operator_bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of weights by operator that a step of one token reads."""
    found: dict[str, int] = defaultdict(int)
    for layer in decoder.layers:
        found["qkv"] += layer.attention.qkv.nbytes
        found["o"] += layer.attention.output.nbytes
        match layer.mlp:
            case GatedMLP():
                found["gate_up"] += layer.mlp.gate_up.nbytes
                found["down"] += layer.mlp.down.nbytes
            case PlainMLP():
                found["gate_up"] += layer.mlp.up.nbytes
                found["down"] += layer.mlp.down.nbytes
            case _:
                found["experts"] += layer.mlp.token_bytes
    found["lm_head"] = decoder.head.nbytes
    return dict(found)


def _layer(layer: DecoderLayer, clock: Clock, index: int) -> DecoderLayer:
    def norm(part: Any) -> Any:
        return None if part is None else _Timed(part, clock, "norms", index)

    attention = replace(
        layer.attention,
        qkv=_Timed(layer.attention.qkv, clock, "qkv"),
        output=_Timed(layer.attention.output, clock, "o"),
    )
    return replace(
        layer,
        input_norm=norm(layer.input_norm),
        mlp_norm=norm(layer.mlp_norm),
        attention_out_norm=norm(layer.attention_out_norm),
        mlp_out_norm=norm(layer.mlp_out_norm),
        attention=cast(Any, _Timed(attention, clock, _ATTENTION, index)),
        mlp=_mlp(layer.mlp, clock, index),
    )


def _mlp(mlp: FeedForward, clock: Clock, index: int) -> FeedForward:
    match mlp:
        case GatedMLP():
            inner: FeedForward = replace(
                mlp,
                gate_up=_Timed(mlp.gate_up, clock, "gate_up"),
                down=_Timed(mlp.down, clock, "down"),
            )
        case PlainMLP():
            inner = replace(
                mlp, up=_Timed(mlp.up, clock, "gate_up"), down=_Timed(mlp.down, clock, "down")
            )
        case _:
            return cast(FeedForward, _Timed(mlp, clock, "experts", index))
    return cast(FeedForward, _Timed(inner, clock, _MLP, index))

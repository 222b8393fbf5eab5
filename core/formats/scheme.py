"""What a quantized layer is: the format of its weight and, where it has one, of its inputs."""

from dataclasses import dataclass
from typing import Literal

from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, Fp8Weight
from infopt.core.formats.nf4 import Nf4Format, Nf4Weight
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

WeightFormat = IntegerFormat | Fp8Format | Nf4Format
StoredWeight = QuantizedWeight | Fp8Weight | Nf4Weight
KvFormat = Literal["int8", "fp8"]
Layout = Literal["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"]
"""The checkpoint formats, by the names of `quant_method`."""


@dataclass(frozen=True, slots=True)
class LayerScheme:
    """The number formats of one linear layer."""

    weight: WeightFormat
    activation: ActivationFormat | None = None

    def describe(self) -> str:
        """Such as 'int4 g64 sym', 'int8 channel sym, int8 inputs per token'."""
        match self.weight:
            case IntegerFormat(bits=bits, symmetric=symmetric, group_size=size):
                group = f"g{size}" if size else "channel"
                words = f"int{bits} {group} {'sym' if symmetric else 'asym'}"
            case Fp8Format(strategy=strategy):
                words = f"fp8 {strategy}"
            case Nf4Format(double=double):
                words = f"nf4 g64{' double' if double else ''}"
        if self.activation is None:
            return words
        form = self.activation
        kind = f"{'fp' if form.kind == 'float' else 'int'}{form.bits}"
        when = f"per {form.strategy}" if form.dynamic else "static"
        kept = f", outliers from {form.outlier_threshold:g}" if form.outlier_threshold else ""
        return f"{words}, {kind} inputs {when}{kept}"

"""A projection whose inputs are rounded to a number format first."""

from dataclasses import dataclass

from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.layers.linear import Projection


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """y = linear(round_inputs(x)): the values that a kernel of that format would multiply."""

    linear: Projection
    activation: ActivationFormat
    input_scale: Tensor | None = None
    """The scale of a static format, [] or [1]."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(round_inputs(x, self.activation, self.input_scale))

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

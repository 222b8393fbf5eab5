"""All kernels, launched as models of today launch them."""

from infopt.kernels.gpu.example import Example

EXAMPLES: tuple[Example, ...] = ()

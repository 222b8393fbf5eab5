"""All kernels, launched as models of today launch them."""

from infopt.kernels.gpu import (
    attention_examples,
    cache_examples,
    product_examples,
    row_examples,
)
from infopt.kernels.gpu.example import Example

EXAMPLES: tuple[Example, ...] = (
    *attention_examples.EXAMPLES,
    *cache_examples.EXAMPLES,
    *product_examples.EXAMPLES,
    *row_examples.EXAMPLES,
)

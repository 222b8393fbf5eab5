"""All kernels, launched as models of today launch them."""

from infopt.kernels.gpu import attention_examples, cache_examples
from infopt.kernels.gpu.example import Example

EXAMPLES: tuple[Example, ...] = (*attention_examples.EXAMPLES, *cache_examples.EXAMPLES)

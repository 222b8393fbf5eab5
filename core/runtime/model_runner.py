"""Run the decoder over one batch."""

import torch
from torch import Tensor

from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.runtime.kv_cache import KVCache


class ModelRunner:
    """A decoder and the cache that it fills."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache

    @torch.inference_mode()
    def run(self, inputs: StepInputs, rows: Tensor | None = None) -> Tensor:
        """Logits [R, vocabulary] of the step's tokens at `rows` [R]; of all where it is None."""
        hidden = self.decoder(inputs, self.cache.layers)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return self.decoder.logits(hidden)

    @torch.inference_mode()
    def first_fault(self, inputs: StepInputs, row: int) -> str:
        """The first layer whose output for a row of the step just run is not finite."""
        return self.decoder.first_fault(inputs, self.cache.layers, row)

"""What the largest step takes beside weights and cache: the pool gets what this leaves."""

import torch

from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import Decoder
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.batch import Span, step_inputs
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.sampler import Draw, sample

# The sampler's copies of all logits in float32, and of one row's in float64, several at a time.
_ALL_ROWS_BYTES = 2 * 4
_ONE_ROW_BYTES = 8 * 8


def step_bytes(decoder: Decoder, settings: EngineSettings, cached: torch.dtype) -> int:
    """What the largest step takes: measured on a GPU, computed on a CPU, where a step is slow."""
    tokens, rows = settings.max_batch_tokens, settings.max_running
    if decoder.device.type == "cuda":
        return measured_step_bytes(
            decoder, tokens=tokens, rows=rows, block_size=settings.block_size, cached=cached
        )
    return computed_step_bytes(decoder.config, tokens=tokens, rows=rows, dtype=decoder.dtype)


def computed_step_bytes(config: ModelConfig, *, tokens: int, rows: int, dtype: torch.dtype) -> int:
    """By arithmetic: a step of `tokens`, of which `rows` are sampled."""
    heads = config.heads + 2 * config.kv_heads
    attention = (2 * heads + config.heads) * config.head_dim  # and a copy to rotate
    mlp = 4 * config.intermediate_size  # gate, up, their activation and product
    layer = 4 * config.hidden_size + max(attention, mlp)
    logits = rows * config.vocab_size * (dtype.itemsize + _ALL_ROWS_BYTES)
    rotation = 2 * config.head_dim
    numbers = 4 * 8  # token, position, slots to write and to read
    each = (layer + rotation) * dtype.itemsize + numbers
    return tokens * each + logits + config.vocab_size * _ONE_ROW_BYTES


def measured_step_bytes(
    decoder: Decoder, *, tokens: int, rows: int, block_size: int, cached: torch.dtype
) -> int:
    """The peak of such a step on a GPU, prompts of equal lengths, drawn from a nucleus.

    `cached` is the dtype of keys and values in the cache.
    """
    device, rows = decoder.device, min(rows, tokens)
    length = tokens // rows
    width = -(-length // block_size)
    cache = KVCache.of(decoder, blocks=rows * width, block_size=block_size, dtype=cached)
    spans = [Span([0] * length, 0, range(r * width, (r + 1) * width)) for r in range(rows)]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = step_inputs(spans, block_size=block_size, dtype=decoder.dtype, device=device)
    last = torch.arange(1, rows + 1, device=device) * length - 1
    logits = ModelRunner(decoder, cache).run(inputs, last)
    params = SamplingParams(top_p=0.9, repetition_penalty=1.1)
    sample(logits, [Draw(params, torch.Generator(), prompt=(0,)) for _ in range(rows)])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before

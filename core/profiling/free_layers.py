"""Time what a layer does beside its products: attention, norms, rotation, activation.

Decoders whose products cost nothing are run as the engine runs them; what a layer takes is what
one of several layers takes longer than one of a single layer. Before each run the last-level cache
is filled with something else, as the weights of a real model fill it: keys and values come from
memory.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.hardware.kernel_times import LayerTime
from infopt.core.layers.attention import Attention
from infopt.core.layers.embedding import Embedding
from infopt.core.layers.linear import Given
from infopt.core.layers.norm import RMSNorm
from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import Decoder, DecoderLayer, RotaryTable, StepInputs
from infopt.core.models.mlp import GatedMLP
from infopt.core.profiling.timer import repeat_for, timed
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention

Steps = Callable[[Decoder, Sequence[Tensor]], Callable[[StepInputs], object]]
"""How the engine computes steps of a decoder over given caches, one of them filled by each layer;
returns when a step is done."""
_BLOCK = 16
_MORE = 5
"""Layers of the larger decoder."""
_CACHES = 4
"""Times the last-level cache is what is read in between."""
_VOCABULARY = 64
_LEAST = 1e-7


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int


_SIZES = (
    _Sizes(512, 1408, 8, 2, 64),
    _Sizes(1024, 2816, 16, 16, 64),
    _Sizes(2048, 5632, 16, 4, 128),
)
# Sequences, new tokens of each, context.
_DECODES = tuple((b, 1, s) for b in (1, 4, 16) for s in (32, 256, 1024))
_PREFILLS = ((1, 32, 32), (1, 128, 128), (1, 512, 512), (1, 1024, 1024), (4, 128, 128))


def layer_times(
    device: torch.device,
    dtype: torch.dtype,
    steps: Steps,
    *,
    cache_bytes: int,
    progress: ProgressCallback,
) -> Iterator[LayerTime]:
    """Median times of a layer without its products, over sizes, batches and contexts."""
    other = torch.ones(_CACHES * cache_bytes // 8, dtype=torch.int64, device=device)
    for done, sizes in enumerate(_SIZES):
        for batch, new, context in (*_DECODES, *_PREFILLS):
            note = f"{batch} x {new} tokens at {context}"
            progress(Progress("measure layers", done, len(_SIZES), note))
            seconds = _layer(sizes, batch, new, context, dtype, steps, other)
            yield LayerTime(
                batch=batch,
                new=new,
                context=context,
                hidden=sizes.hidden,
                inner=sizes.inner,
                heads=sizes.heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                seconds=seconds,
            )


def _layer(
    sizes: _Sizes,
    batch: int,
    new: int,
    context: int,
    dtype: torch.dtype,
    steps: Steps,
    other: Tensor,
) -> float:
    """Seconds of one layer: both decoders in turns, each after `other` was read."""
    device = other.device
    inputs = _inputs(batch, new, context, device, dtype)
    blocks = batch * -(-context // _BLOCK)
    caches = [
        new_cache(blocks, _BLOCK, sizes.kv_heads, sizes.head_dim, dtype, device).normal_()
        for _ in range(_MORE)
    ]
    both = [
        steps(free_decoder(sizes, layers, batch * new, device, dtype), caches[:layers])
        for layers in (1, _MORE)
    ]
    times: list[list[float]] = [[], []]

    def turn() -> None:
        for step, kept in zip(both, times, strict=True):
            other.sum().item()
            kept.append(timed(lambda step=step: step(inputs)))  # type: ignore[misc]

    with torch.inference_mode():
        repeat_for(turn, seconds=0.3, warmup=2, least=7, most=30)
    one, more = (statistics.median(kept[2:]) for kept in times)
    return max(_LEAST, (more - one) / (_MORE - 1))


def _inputs(
    batch: int, new: int, context: int, device: torch.device, dtype: torch.dtype
) -> StepInputs:
    blocks = -(-context // _BLOCK)
    tables = [range(row, batch * blocks, batch) for row in range(batch)]
    slots = [
        table[place // _BLOCK] * _BLOCK + place % _BLOCK
        for table in tables
        for place in range(context - new, context)
    ]
    return StepInputs(
        token_ids=torch.zeros(batch * new, dtype=torch.int64, device=device),
        positions=torch.arange(context - new, context, device=device).repeat(batch),
        slots=torch.tensor(slots, device=device),
        plan=plan_attention(
            tables,
            [context] * batch,
            [row * new for row in range(batch + 1)],
            _BLOCK,
            dtype,
            device,
        ),
    )


def free_decoder(
    sizes: _Sizes, layers: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """A Llama of random embeddings whose products cost nothing."""

    def given(width: int) -> Given:
        return Given(torch.randn(tokens, width, device=device).to(dtype))

    norm = RMSNorm(torch.ones(sizes.hidden, device=device, dtype=dtype), 1e-5)
    vectors = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    layer = DecoderLayer(
        norm,
        Attention(
            qkv=given(vectors),
            output=given(sizes.hidden),
            head_norm=None,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
        ),
        norm,
        GatedMLP(given(2 * sizes.inner), given(sizes.hidden)),
    )
    table = torch.randn(_VOCABULARY, sizes.hidden, device=device).to(dtype)
    return Decoder(
        config=_config(sizes, layers),
        embedding=Embedding(table),
        layers=(layer,) * layers,
        norm=norm,
        head=given(_VOCABULARY),
        rotaries=(RotaryTable(torch.rand(sizes.head_dim // 2, device=device), 1.0),),
    )


def _config(sizes: _Sizes, layers: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": _VOCABULARY,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        }
    )

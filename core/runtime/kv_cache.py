"""The paged KV cache: one tensor a layer, laid out as the attention kernels want it."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from infopt.core.artifact.quantized import kv_format
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ResourceError
from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import Decoder
from infopt.core.recipe.serve import KvDType
from infopt.kernels.attention import cache as plain
from infopt.kernels.attention.cache import (
    copy_blocks,
    read_blocks,
    write_blocks,
)
from infopt.kernels.attention.eight_bits import fill_with_noise
from infopt.kernels.gpu import cache as card

# Of the memory that is free once weights and the largest step are in it; the rest is for others.
_CPU_SHARE = 0.5
_CUDA_SHARE = 0.9


def cache_dtype(word: KvDType, artifact: Artifact, dtype: torch.dtype) -> torch.dtype:
    """Of keys and values: what is asked for, else what the artifact says, else the run's dtype."""
    match word if word != "auto" else kv_format(artifact):
        case "int8":
            return torch.int8
        case "fp8":
            return torch.float8_e4m3fn
        case _:
            return dtype


class KVCache:
    """The caches of all layers; block b of a request is block b in each."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        on_card: bool = False,
    ) -> None:
        """`on_card`: laid out for a GPU's own kernels, not for torch."""
        self.blocks = blocks
        self.block_size = block_size
        self._on_card, self._heads = on_card, (config.kv_heads, config.head_dim)
        shape = (blocks, block_size, config.kv_heads, config.head_dim)
        new_cache = card.new_cache if on_card else plain.new_cache
        try:
            self.layers: list[Tensor] = [
                new_cache(*shape, dtype, device) for _ in range(config.layers)
            ]
        except RuntimeError as error:
            size = blocks * block_bytes(config, block_size, dtype, on_card=on_card)
            raise ResourceError(
                f"no memory for a KV cache of {size / 2**30:.1f} GiB on {device}",
                "ask for fewer blocks: --kv-blocks",
            ) from error

    @classmethod
    def of(cls, decoder: Decoder, *, blocks: int, block_size: int, dtype: torch.dtype) -> "KVCache":
        """Laid out for the kernels that the decoder's attention runs; raises as the constructor."""
        return cls(
            decoder.config,
            blocks=blocks,
            block_size=block_size,
            dtype=dtype,
            device=decoder.device,
            on_card=decoder.card is not None,
        )

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of what `read` gives for each block."""
        return (len(self.layers), *self.layers[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored: that of bytes where keys and values are kept in 8 bits."""
        return self.layers[0].dtype

    def fill_with_noise(self) -> None:
        """Finite keys and values in all slots, for timing."""
        for layer in self.layers:
            if self._on_card:
                card.fill_with_noise(layer, *self._heads)
            else:
                fill_with_noise(layer)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (source, target), in every layer."""
        sources, targets = (self._index(blocks) for blocks in zip(*pairs, strict=True))
        for layer in self.layers:
            copy_blocks(layer, sources, targets)

    def read(self, blocks: Sequence[int]) -> list[Tensor]:
        """What each block holds, all layers in one tensor in host memory."""
        index = self._index(blocks)
        contents = torch.stack([read_blocks(layer, index) for layer in self.layers], dim=1).cpu()
        # Each its own: a view would keep the others alive.
        return [block.clone() for block in contents]

    def write(self, blocks: Sequence[int], contents: Sequence[Tensor]) -> None:
        """Put back what `read` gave."""
        index, stacked = self._index(blocks), torch.stack(list(contents), dim=1)
        for layer, content in zip(self.layers, stacked, strict=True):
            write_blocks(layer, index, content)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.layers[0].device)


def block_bytes(
    config: ModelConfig, block_size: int, dtype: torch.dtype, *, on_card: bool = False
) -> int:
    """Bytes of one block over all layers."""
    token_bytes = card.token_bytes if on_card else plain.token_bytes
    return config.layers * block_size * token_bytes(config.kv_heads, config.head_dim, dtype)


def blocks_that_fit(
    config: ModelConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    enough: int,
    step_bytes: int,
    on_card: bool = False,
) -> int:
    """Blocks in a share of the memory that is free now less `step_bytes`, at most `enough`.

    Raises ResourceError where not even one fits.
    """
    if device.type == "cuda":
        free = int((torch.cuda.mem_get_info(device)[0] - step_bytes) * _CUDA_SHARE)
    else:
        free = int((psutil.virtual_memory().available - step_bytes) * _CPU_SHARE)
    one = block_bytes(config, block_size, dtype, on_card=on_card)
    if not on_card:
        one += one // config.layers  # torch's attention gathers what it reads, a layer at a time
    if free < one:
        raise ResourceError(
            f"the free memory of {device} does not hold one KV block of {one / 2**20:.0f} MiB"
        )
    return min(enough, free // one)

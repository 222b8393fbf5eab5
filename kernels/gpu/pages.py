"""A cache of 16 or 32 bits as tensor descriptors see it, for tiles of keys that come by TMA.

Not the way of any tile that ships: whether it is faster than plain pointers is to be measured. A
Hopper cannot gather rows (PTX has `tile::gather4` from sm_100 on), so that a tile of keys must lie
whole in one block.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from infopt.kernels.attention.eight_bits import STORAGE
from infopt.kernels.gpu.tile import Card, Tile, power_of_two


def pages_of(card: Card, tile: Tile, cache: Tensor, head_dim: int) -> TensorDescriptor | None:
    """The cache, token after token, where the tile wants it so (`TMA`); None where it does not,
    where the GPU is older than Hopper, and for caches and tiles that it cannot be for."""
    rows = tile.constants["BLOCK_N"]
    whole = cache.shape[1] % rows == 0 and power_of_two(head_dim, 16) == head_dim
    if not tile.constants.get("TMA") or card.capability < 90 or not whole:
        return None
    if cache.dtype in STORAGE.values():
        return None
    return TensorDescriptor.from_tensor(cache.flatten(2).flatten(0, 1), [rows, head_dim])

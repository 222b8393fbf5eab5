"""What lies below the KV pool: host memory, disk, both or neither, as the settings say."""

from pathlib import Path

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.models.decoder import Decoder
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.prefix_disk import PrefixDisk, block_identity
from infopt.core.runtime.prefix_store import PrefixStore


def open_store(
    artifact: Artifact,
    settings: EngineSettings,
    decoder: Decoder,
    cache: KVCache,
    kept: torch.dtype,
) -> PrefixStore | None:
    """What lies below the pool, if anything; `kept` is the dtype of keys and values.

    Raises what PrefixDisk does of a folder or a limit that it cannot take.
    """
    disk = None
    if settings.prefix_disk is not None:
        shape, dtype = cache.block_shape, cache.dtype
        identity = block_identity(
            artifact,
            decoder.device,
            shape=shape,
            dtype=dtype,
            kept=str(kept),
            computed=str(decoder.dtype),
            deterministic=settings.deterministic,
        )
        disk = PrefixDisk(
            Path(settings.prefix_disk).expanduser(),
            settings.prefix_disk_limit,
            identity=identity,
            shape=shape,
            dtype=dtype,
        )
    if disk is None and not settings.prefix_host_bytes:
        return None
    return PrefixStore(settings.prefix_host_bytes, disk)

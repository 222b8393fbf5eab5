"""What serving a model would take; needs neither the server's packages nor the weights."""

import torch

from infopt.core.artifact.quantized import kv_format
from infopt.core.artifact.read import Artifact
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.config import ModelConfig
from infopt.core.models.stored import weight_bytes
from infopt.core.recipe.serve import EngineSettings, ServeSettings
from infopt.core.reports.schema import Plan
from infopt.core.runtime.kv_cache import block_bytes, blocks_that_fit, cache_dtype
from infopt.core.runtime.step_memory import computed_step_bytes
from infopt.core.server.foreign import foreign_command

# Interpreter, torch and transformers in the engine process, and the API process beside it.
_PROCESSES_BYTES = 900 * 2**20


def plan_serve(artifact: Artifact, settings: EngineSettings) -> Plan:
    """The weights, KV cache and memory of an engine, or of a server where these are its settings.

    Raises UnsupportedError for a model that the decoder does not know. An estimate: the free memory
    is that of now, before the weights are in it.
    """
    if isinstance(settings, ServeSettings) and settings.engine != "infopt":
        command = foreign_command(settings.engine, str(artifact.path), settings)
        # Its weights at least; what else it takes is its own to decide.
        least = artifact.weight_bytes + _PROCESSES_BYTES
        return Plan(command="serve", actions=(f"run {' '.join(command)}",), memory_bytes=least)
    config = ModelConfig.from_hf(artifact.config)
    name = choose_device(settings.device)
    dtype: torch.dtype = getattr(torch, choose_dtype(settings.dtype, name))
    weights = weight_bytes(artifact, dtype)
    dense = artifact.summary().parameters * dtype.itemsize
    stored = _word(dtype) if weights == dense else f"stored and {_word(dtype)}"
    longest = settings.max_model_len or config.full_attention_positions
    kept = cache_dtype(settings.kv_dtype, artifact, dtype)
    step_bytes = computed_step_bytes(
        config, tokens=settings.max_batch_tokens, rows=settings.max_running, dtype=dtype
    )
    blocks = settings.kv_blocks or blocks_that_fit(
        config,
        block_size=settings.block_size,
        dtype=kept,
        device=torch.device(name),
        enough=settings.max_running * -(-longest // settings.block_size),
        step_bytes=step_bytes,
    )
    cache = blocks * block_bytes(config, settings.block_size, kept)
    actions = [
        f"load {artifact.name}: {_size(weights)} of weights as {stored} on {name}",
        f"hold a KV cache of {blocks} blocks of {settings.block_size} tokens: {_size(cache)}",
    ]
    if settings.prefix_host_bytes:
        held = _size(settings.prefix_host_bytes)
        actions.append(f"keep up to {held} of prefixes that the cache gave up in host memory")
    if settings.prefix_disk is not None:
        held = _size(settings.prefix_disk_limit)
        folder = settings.prefix_disk
        actions.append(f"keep up to {held} of prefixes that memory gave up in {folder}")
    if kept != dtype:
        form = "int8" if kept == torch.int8 else "fp8"
        scales = "its own scales" if kv_format(artifact) == form else "a scale a head and token"
        actions.append(f"keep keys and values in {form}, with {scales}")
    if isinstance(settings, ServeSettings):
        model = settings.model_name or artifact.name
        actions.append(f"serve it as {model!r} on {settings.host}:{settings.port}")
    return Plan(
        command="serve",
        actions=tuple(actions),
        memory_bytes=weights + cache + step_bytes + settings.prefix_host_bytes + _PROCESSES_BYTES,
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

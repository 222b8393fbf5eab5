"""Other engines behind the same verb: their command lines from infopt's settings; pure.

A setting that the other engine has no word for is refused by name: it would be ignored.
"""

import sys
from collections.abc import Mapping
from typing import Any

from infopt.core.errors import UsageError
from infopt.core.recipe.serve import ServeEngine, ServeSettings

_VLLM: dict[str, str] = {
    "host": "--host",
    "port": "--port",
    "model_name": "--served-model-name",
    "block_size": "--block-size",
    "kv_blocks": "--num-gpu-blocks-override",
    "kv_dtype": "--kv-cache-dtype",
    "max_batch_tokens": "--max-num-batched-tokens",
    "max_running": "--max-num-seqs",
    "max_model_len": "--max-model-len",
    "prefix_caching": "--enable-prefix-caching",
    "dtype": "--dtype",
    "seed": "--seed",
    "tls_cert": "--ssl-certfile",
    "tls_key": "--ssl-keyfile",
    "drain_timeout": "--shutdown-timeout",
}
_SGLANG: dict[str, str] = {
    "host": "--host",
    "port": "--port",
    "model_name": "--served-model-name",
    "block_size": "--page-size",
    "kv_dtype": "--kv-cache-dtype",
    "max_batch_tokens": "--chunked-prefill-size",
    "max_running": "--max-running-requests",
    "max_model_len": "--context-length",
    "max_queued_requests": "--max-queued-requests",
    "prefix_caching": "--disable-radix-cache",
    "dtype": "--dtype",
    "seed": "--random-seed",
    "tls_cert": "--ssl-certfile",
    "tls_key": "--ssl-keyfile",
}
_TRANSFORMERS: dict[str, str] = {
    "host": "--host",
    "port": "--port",
    "block_size": "--cb-block-size",
    "kv_blocks": "--cb-num-blocks",
    "max_batch_tokens": "--cb-max-batch-tokens",
    "dtype": "--dtype",
    "device": "--device",
    "seed": "--default-seed",
}
# Its --ctx-size is shared out among its slots: no word for max_model_len.
_LLAMA_CPP: dict[str, str] = {
    "host": "--host",
    "port": "--port",
    "model_name": "--alias",
    "max_batch_tokens": "--batch-size",
    "max_running": "--parallel",
    "seed": "--seed",
    "tls_cert": "--ssl-cert-file",
    "tls_key": "--ssl-key-file",
}
_FLAGS: dict[str, dict[str, str]] = {
    "vllm": _VLLM,
    "sglang": _SGLANG,
    "llama.cpp": _LLAMA_CPP,
    "transformers": _TRANSFORMERS,
}
_KV_WORDS: dict[str, Mapping[str, str]] = {
    "vllm": {"auto": "auto", "fp8": "fp8"},
    "sglang": {"auto": "auto", "fp8": "fp8_e4m3"},
}


def foreign_command(
    engine: ServeEngine, model: str, settings: ServeSettings, *, trust_remote_code: bool = False
) -> tuple[str, ...]:
    """The command that serves `model` by another engine as `settings` ask.

    Raises UsageError for a setting off its default that the engine does not have.
    """
    flags = _FLAGS[engine]
    words = [*_begin(engine, model)]
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        if key == "engine":
            continue
        if key in ("host", "port"):
            words += [flags[key], str(value)]
        elif value == field.default:
            continue
        elif key not in flags:
            raise UsageError(
                f"{key} is not known to {engine}, which would ignore it",
                "leave it out, or serve with --engine infopt",
            )
        else:
            words += _said(engine, key, flags[key], value)
    if trust_remote_code and engine != "llama.cpp":  # a GGUF file brings no code
        words.append("--trust-remote-code")
    return tuple(words)


def _begin(engine: ServeEngine, model: str) -> list[str]:
    match engine:
        case "vllm":
            return ["vllm", "serve", model]
        case "sglang":
            return [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        case "llama.cpp":
            return ["llama-server", "--model", model]
        case "transformers":
            return ["transformers", "serve", model, "--continuous-batching"]
        case "infopt":
            raise AssertionError("infopt's own engine is no other")


def _said(engine: ServeEngine, key: str, flag: str, value: Any) -> list[str]:
    if key == "prefix_caching":  # on by default everywhere
        return ["--no-enable-prefix-caching"] if engine == "vllm" else [flag]
    if key == "kv_dtype":
        word = _KV_WORDS[engine].get(value)
        if word is None:
            raise UsageError(f"kv_dtype {value} is not known to {engine}", "fp8 is")
        return [flag, word]
    if key == "drain_timeout":
        return [flag, str(round(value))]
    return [flag, str(value)]

"""config.json of the model that a GGUF file's fields describe."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from infopt.core.artifact.gguf_file import GgufFile
from infopt.core.errors import ArtifactError, UnsupportedError

# GGUF's architecture -> transformers' class and model_type. Mistral's files say llama.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_TOKENS = ("bos", "eos", "padding")
# Llama 3's bands; only `factor` differs between its models.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def architecture_of(file: GgufFile) -> str:
    """Such as 'llama'; raises UnsupportedError naming the known."""
    found = file.fields.get("general.architecture")
    if found not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path} holds the architecture {found!r}",
            f"known in GGUF: {', '.join(_ARCHITECTURES)} (mistral's files say llama)",
        )
    return str(found)


def gguf_config(
    file: GgufFile, rope_factors: np.ndarray[Any, Any] | None, dtype: str
) -> dict[str, Any]:
    """config.json as transformers 5 reads it.

    rope_factors: float32 [head_dim / 2], the frequency divisors that Llama 3's files carry.
    """
    architecture = architecture_of(file)
    values = _Fields(file, architecture)
    heads = values.integer("attention.head_count")
    hidden = values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", hidden // heads)
    for key, default in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if values.integer(key, default) != head_dim:
            raise UnsupportedError(f"{file.path}: {key} is not the head dimension {head_dim}")
    if values.integer("expert_count", 0):
        raise UnsupportedError(
            f"{file.path} is a mixture of experts", "only dense models are known"
        )
    name, model_type = _ARCHITECTURES[architecture]
    context = values.integer("context_length")
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "attention_dropout": 0.0,
        **_token_ids(file.fields),
        "dtype": dtype,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": values.integer("feed_forward_length"),
        "max_position_embeddings": context,
        "num_attention_heads": heads,
        "num_hidden_layers": values.integer("block_count"),
        "num_key_value_heads": values.integer("attention.head_count_kv", heads),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(values, context, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
        "vocab_size": _vocabulary(file),
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    elif model_type == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    else:
        config["use_sliding_window"] = False
    return dict(sorted(config.items()))


def generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: what begins, ends and fills a text; the end of a turn ends it too."""
    ids = _token_ids(fields)
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    turn = fields.get("tokenizer.ggml.eot_token_id")
    if isinstance(turn, int) and turn not in ends:
        ends.append(turn)
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def _token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {word: fields.get(f"tokenizer.ggml.{word}_token_id") for word in _TOKENS}
    found["pad"] = found.pop("padding")
    return {f"{word}_token_id": value for word, value in found.items() if isinstance(value, int)}


def _vocabulary(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ArtifactError(f"{file.path} has no token embedding")
    return embedding.shape[0]


def _rope(
    values: "_Fields", context: int, head_dim: int, factors: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    theta = values.number("rope.freq_base", 10000.0)
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        return {"rope_theta": theta, **_llama3(values.path, theta, head_dim, factors)}
    match kind:
        case "none":
            return {"rope_theta": theta, "rope_type": "default"}
        case "linear" | "yarn":
            scaled = {"rope_theta": theta, "rope_type": kind}
            scaled["factor"] = values.number("rope.scaling.factor")
            if kind == "yarn":
                length = values.integer("rope.scaling.original_context_length", context)
                scaled["original_max_position_embeddings"] = length
            return scaled
    raise UnsupportedError(f"{values.path}: RoPE scaling {kind!r}", "known: none, linear, yarn")


def _llama3(
    path: object, theta: float, head_dim: int, factors: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Llama 3's scaling, whose largest divisor is its factor; held to every divisor in the file."""
    factor = float(factors.max())
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ratio = _LLAMA3["original_max_position_embeddings"] / wavelength
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedError(f"{path}: its RoPE frequencies are not scaled in Llama 3's way")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


class _Fields:
    """The fields of one architecture, each checked as it is read."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.path, self._fields, self._prefix = file.path, file.fields, architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(f"{self._prefix}.{key}", default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]  # per layer, all alike
        if value is None:
            raise ArtifactError(f"{self.path} has no field {self._prefix}.{key}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list):
            raise UnsupportedError(f"{self.path}: {self._prefix}.{key} differs between layers")
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise ArtifactError(f"{self.path}: {self._prefix}.{key} is {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise ArtifactError(f"{self.path}: {self._prefix}.{key} is {value!r}")
        # GGUF keeps float32: the shortest decimal that means it is what its author wrote.
        return float(str(np.float32(value)))

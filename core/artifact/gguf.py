"""A GGUF file becomes a Hugging Face directory, one tensor in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infopt.core.artifact.card import render_front
from infopt.core.artifact.gguf_config import architecture_of, generation_config, gguf_config
from infopt.core.artifact.gguf_file import GgufFile, GgufTensor, read_gguf
from infopt.core.artifact.gguf_tokenizer import gguf_tokenizer
from infopt.core.artifact.names import hf_name
from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import write_directory
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.progress import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float32]]

# Frequency divisors of Llama 3's RoPE: they go to the config.
_ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(
    file: Path,
    output: Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    progress: ProgressCallback = silent,
    replace: bool = False,
) -> Artifact:
    """Dequantize a GGUF file into a new artifact; see `output_dtype` for its dtype.

    Raises ArtifactError for a damaged file, UnsupportedError for a type, architecture or
    tokenizer that is not known.
    """
    gguf = read_gguf(file)
    factors = gguf.tensors.get(_ROPE_FACTORS)
    dtype = output_dtype(gguf)
    config = gguf_config(gguf, dequantize(gguf, factors) if factors else None, dtype)
    names = _checked_names(gguf, config)
    if len(gguf.fields.get("tokenizer.ggml.tokens") or ()) > config["vocab_size"]:
        raise ArtifactError(f"{file}: its vocabulary has more tokens than its embedding rows")
    files = gguf_tokenizer(file, gguf.fields)
    files["generation_config.json"] = json.dumps(generation_config(gguf.fields), indent=2) + "\n"
    files["README.md"] = _card(gguf, name, base_model)
    tensors = _tensors(gguf, names, config, dtype, progress)
    return write_directory(
        output, tensors=tensors, config=config, files=files, name=name, replace=replace
    )


def dequantize(gguf: GgufFile, tensor: GgufTensor) -> Floats:
    """A stored tensor as float32, in its row-major shape."""
    from gguf import GGMLQuantizationType, quants

    raw = np.fromfile(gguf.path, np.uint8, tensor.nbytes, offset=tensor.offset)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    values: Floats = quants.dequantize(rows, GGMLQuantizationType(tensor.type))
    return values.reshape(tensor.shape)


def unpermute(weight: Floats, heads: int) -> Floats:
    """Llama's q or k [heads * d, ...] with its rotary pairs, interleaved in GGUF, in halves again.

    GGUF keeps row 2i + s of a head where Hugging Face has row s * d/2 + i.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def output_dtype(gguf: GgufFile) -> str:
    """The dtype that loses nothing where the file is not quantized; bfloat16 otherwise."""
    kinds = {tensor.type_name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(
        frozenset(kinds), "bfloat16"
    )


def _tensors(
    gguf: GgufFile,
    names: dict[str, str],
    config: dict[str, Any],
    dtype: str,
    progress: ProgressCallback,
) -> Iterator[tuple[str, "Tensor"]]:
    import torch

    interleaved = architecture_of(gguf) == "llama"
    total = len(names)
    for done, (stored, name) in enumerate(sorted(names.items(), key=lambda pair: pair[1])):
        progress(Progress("convert", done, total, stored))
        values = dequantize(gguf, gguf.tensors[stored])
        if interleaved and ".q_proj." in name:
            values = unpermute(values, config["num_attention_heads"])
        elif interleaved and ".k_proj." in name:
            values = unpermute(values, config["num_key_value_heads"])
        yield name, torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    progress(Progress("convert", total, total))


def _checked_names(gguf: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name to Hugging Face name; every needed tensor is there and has its shape."""
    names: dict[str, str] = {}
    for stored in gguf.tensors:
        name = hf_name(stored)
        if name is None and stored != _ROPE_FACTORS:
            raise UnsupportedError(f"{gguf.path} has the tensor {stored!r}, which is not known")
        if name is not None:
            names[stored] = name
    if config["num_hidden_layers"] > len(gguf.tensors):  # before they are counted up one by one
        raise ArtifactError(f"{gguf.path} lacks blocks: {config['num_hidden_layers']} are claimed")
    shapes = _shapes(config)
    found = {name: gguf.tensors[stored].shape for stored, name in names.items()}
    for name, shape in shapes.items():
        if name not in found:
            raise ArtifactError(f"{gguf.path} lacks the tensor of {name}")
        if found[name] != shape:
            raise ArtifactError(
                f"{gguf.path}: the tensor of {name} is {list(found[name])}, not {list(shape)}"
            )
    for name, shape in found.items():
        weight = shapes.get(name.removesuffix("bias") + "weight")
        if name not in shapes and (weight is None or shape != weight[:1]):
            raise ArtifactError(f"{gguf.path}: there is no place for the tensor of {name}")
    return names


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights that a model of this config must have."""
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if config["model_type"] == "qwen3":
        block |= {"self_attn.q_norm": (d,), "self_attn.k_norm": (d,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def _card(gguf: GgufFile, name: str | None, base_model: str | None) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["infopt"]}
    licence = gguf.fields.get("general.license")
    if isinstance(licence, str):
        head["license"] = licence
    if base_model:
        head["base_model"] = base_model
    kinds = sorted({tensor.type_name for tensor in gguf.tensors.values()})
    title = name or gguf.fields.get("general.name") or gguf.path.stem
    return (
        f"{render_front(head)}# {title}\n\nConverted by infopt from the GGUF file"
        f" `{gguf.path.name}` ({', '.join(kinds)}); what its quantization lost stays lost.\n"
    )

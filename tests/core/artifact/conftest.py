from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from infopt.core.artifact.names import hf_name
from infopt.core.artifact.read import Artifact, read_artifact

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    config_class, model_class, more = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **more, **changes}))
    for parameter in model.parameters():  # norms and biases are not left at 1 and 0
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def artifact(model_directory: Path) -> Artifact:
    return read_artifact(model_directory)


@pytest.fixture
def helpers() -> SimpleNamespace:
    """What makes tiny models, and GGUF files of them."""
    return SimpleNamespace(tiny=tiny, write_gguf=write_gguf, permute=permute)


def byte_tokens() -> list[str]:
    """The alphabet of byte-level BPE, after five special tokens, and three merges' results."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<s>", "</s>", "<unk>", "<tool>", "<|turn|>"]
    found = special + list(bytes_to_unicode().values())
    found += ["Ġt", "he", "Ġthe"]
    return found + [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(found))]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf stores q and k."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    kind: str = "llama",
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    drop: tuple[str, ...] = (),
    fields: dict[str, str] | None = None,
    factors: np.ndarray | None = None,
) -> Path:
    """A GGUF file as llama.cpp's converter writes it."""
    c = model.config
    w = gguf.GGUFWriter(path, kind)
    w.add_name("tiny")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if kind == "qwen3":
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    for key, value in (fields or {}).items():
        w.add_string(key, value)
    tokens = byte_tokens()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([3, 3, 2, 4, 3] + [1] * (len(tokens) - 5))
    w.add_token_merges(["Ġ t", "h e", "Ġt he"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(False)
    w.add_chat_template("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
    if factors is not None:
        w.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = {hf: stored for stored in stored_names(c) if (hf := hf_name(stored))}
    for name, tensor in model.state_dict().items():
        if names[name] in drop:
            continue
        values = tensor.float().numpy()
        if kind == "llama" and ".q_proj." in name:
            values = permute(values, c.num_attention_heads)
        if kind == "llama" and ".k_proj." in name:
            values = permute(values, c.num_key_value_heads)
        if values.ndim > 1 and matrices != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(values, matrices)
            w.add_tensor(names[name], packed, raw_dtype=matrices)
        else:
            w.add_tensor(names[name], np.ascontiguousarray(values))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def stored_names(config: Any) -> list[str]:
    blocks = [
        f"blk.{layer}.{part}.{kind}"
        for layer in range(config.num_hidden_layers)
        for kind in ("weight", "bias")
        for part in (
            "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
            "attn_q_norm", "attn_k_norm", "ffn_gate", "ffn_up", "ffn_down",
        )
    ]  # fmt: skip
    return ["token_embd.weight", "output_norm.weight", "output.weight", *blocks]

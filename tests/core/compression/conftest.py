"""Tiny random models of several families, on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.bloom import BloomConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from infopt.core.artifact.read import Artifact, read_artifact

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GATED = {
    **_COMMON,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_GATED),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=8),
    "phi3": lambda: Phi3Config(**_GATED),
    "gemma3": lambda: Gemma3TextConfig(
        **_GATED,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(
        **{k: v for k, v in _COMMON.items() if "heads" not in k}, n_head=4
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    ),
}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[str], Artifact]:
    """A random model of a family, saved in float32."""

    def make(family: str) -> Artifact:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
        # The usual initialization is so small that blocks hardly change their input.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / family)
        return read_artifact(tmp_path / family)

    return make

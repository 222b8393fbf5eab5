"""Tiny random models on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopt.core.artifact.read import Artifact, read_artifact

VOCABULARY = 256
LIVELY = {"tie_word_embeddings": False, "initializer_range": 0.2}


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Artifact]:
    """A random Llama of two blocks with a byte tokenizer; keywords change its config.

    A small one whose head is its table goes on repeating the token that it reads, whatever its
    blocks do; a `lively` one says something else at each position.
    """

    def make(name: str = "tiny", *, lively: bool = False, **changes: Any) -> Artifact:
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(**(settings | (LIVELY if lively else {}) | changes))
        ).to(torch.bfloat16)
        path = tmp_path / name
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return read_artifact(path)

    return make


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])


@pytest.fixture
def calibration_file(tmp_path: Path) -> Path:
    """Enough text for any tiny test."""
    file = tmp_path / "calibration.txt"
    words = [f"word{i % 97} is number {i * i % 1009}." for i in range(2000)]
    file.write_text(" ".join(words))
    return file


def table(path: Path) -> dict[str, Any]:
    """A JSON file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found

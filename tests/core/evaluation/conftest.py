"""Tiny random models with a byte tokenizer, and a text to judge them on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopt.core.artifact.read import Artifact, read_artifact

MakeArtifact = Callable[..., Artifact]


def byte_tokenizer(*, shift: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte; `shift` renumbers them, for a tokenizer of the same size that differs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: (i + shift) % 256 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """Write a tiny Llama and read it as an artifact."""

    def make(name: str, *, seed: int = 0, vocabulary: int = 256, shift: int = 0) -> Artifact:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.5,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        byte_tokenizer(shift=shift).save_pretrained(tmp_path / name)
        return read_artifact(tmp_path / name)

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """A text of 500 bytes, and so of 500 tokens."""
    file = tmp_path / "text.txt"
    file.write_text("".join("A quick word, a slow one, and 7 more.\n" for _ in range(20))[:500])
    return str(file)

"""What every room's tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infopt.core.libraries import share_cores

if TYPE_CHECKING:
    from infopt.core.artifact.read import Artifact

share_cores()  # before any test loads torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests alone come first: among several workers nobody waits for them then."""
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in quick)


@pytest.fixture(scope="session")
def default_artifact() -> "Artifact":
    """The real default model."""
    from infopt.core.artifact.locate import locate

    return locate(None)


@pytest.fixture(autouse=True, scope="session")
def _leave_no_files() -> Iterator[None]:
    """A test suite that litters the tree fails."""
    root = Path(__file__).parents[1]
    before = set(root.iterdir())
    yield
    left = {path.name for path in set(root.iterdir()) - before} - {".pytest_cache", ".hypothesis"}
    assert not left, f"tests left files in the tree: {sorted(left)}"


@pytest.fixture(scope="session")
def tiny_model(default_artifact: "Artifact", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Llama with random weights and the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=default_artifact.config["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    default_artifact.tokenizer().save_pretrained(folder)
    return folder

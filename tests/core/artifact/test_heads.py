import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infopt.core.artifact.heads import HEADS, HeadsShape, read_heads, write_heads
from infopt.core.artifact.write import verify_manifest
from infopt.core.errors import ArtifactError, UsageError

SHAPE = HeadsShape("base", "f" * 64, 2, 1, 8, 20, shared=True)


def tensors(shape: HeadsShape = SHAPE) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(size, dtype=torch.bfloat16) for name, size in shape.shapes().items()}


@pytest.mark.parametrize(("shared", "guessed"), [(True, None), (False, None), (False, 7)])
def test_what_is_written_is_read(tmp_path: Path, shared: bool, guessed: int | None) -> None:
    shape = HeadsShape("base", "f" * 64, 2, 3, 8, 20, shared=shared, guessed=guessed)
    given = tensors(shape)
    if guessed is not None:
        given["token_map"] = torch.arange(guessed)
    assert len(given) == 2 * 3 * 2 + (0 if shared else 2) + (guessed is not None)
    written = write_heads(tmp_path / "heads", shape, given, extra={"recipe.yaml": "x"})
    again = read_heads(tmp_path / "heads")
    assert again == written and again.shape == shape
    assert all(torch.equal(again.tensors()[name], value) for name, value in given.items())
    assert again.nbytes == sum(value.nbytes for value in given.values())
    verify_manifest(tmp_path / "heads")
    with pytest.raises(UsageError, match="exists already"):
        write_heads(tmp_path / "heads", shape, given)
    write_heads(tmp_path / "heads", shape, given, replace=True)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        read_heads(tmp_path / "none")
    with pytest.raises(ArtifactError, match="no Medusa heads"):
        read_heads(tmp_path)
    written = write_heads(tmp_path / "heads", SHAPE, tensors())
    config = json.loads((written.path / "config.json").read_text())

    def with_config(**changes: object) -> None:
        (written.path / "config.json").write_text(json.dumps(config | changes))

    with_config(num_heads=3)
    with pytest.raises(ArtifactError, match=r"blocks\.2\.layers\.0\.bias is missing"):
        read_heads(written.path)
    with_config(hidden_size=4)
    with pytest.raises(ArtifactError, match="asks for"):
        read_heads(written.path)
    with_config(vocab_size=0)
    with pytest.raises(ArtifactError, match="vocab_size must be"):
        read_heads(written.path)
    with_config(truncated_vocab_size=21)
    with pytest.raises(ArtifactError, match="truncated_vocab_size must be"):
        read_heads(written.path)
    with_config(model_type="llama")
    with pytest.raises(ArtifactError, match="not of Medusa heads"):
        read_heads(written.path)
    with_config()
    save_file({"more": torch.zeros(1), **tensors()}, written.path / HEADS)
    with pytest.raises(ArtifactError, match="more is"):
        read_heads(written.path)


def test_wrong_tensors_are_not_written(tmp_path: Path) -> None:
    given = tensors()
    given.pop("blocks.1.layers.0.bias")
    with pytest.raises(ArtifactError, match="missing"):
        write_heads(tmp_path / "heads", SHAPE, given)
    assert not list(tmp_path.iterdir())

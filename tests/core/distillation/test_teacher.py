"""What fits together, and what the teacher writes beforehand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.distillation import teacher as room
from infopt.core.distillation.teacher import (
    check_vocabularies,
    matched_layers,
    show_attention,
    taught_windows,
)
from infopt.core.errors import ResumeError, UnsupportedError, UsageError
from infopt.core.models.hf import load_transformers
from infopt.core.training.data import Windows, split_windows

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]


def test_vocabularies_that_differ_are_refused(make_llama: MakeLlama) -> None:
    one = make_llama("one")
    check_vocabularies(one, make_llama("two", num_hidden_layers=1))
    with pytest.raises(UsageError, match="knows 300 tokens, its teacher one 256"):
        check_vocabularies(one, make_llama("three", vocab_size=300))
    other = make_llama("four")
    file = other.path / "tokenizer.json"
    file.write_text(file.read_text().replace('"!":0', '"?!":0').replace('"!": 0', '"?!": 0'))
    with pytest.raises(UsageError, match="different vocabularies"):
        check_vocabularies(one, read_artifact(other.path))


def test_layers_are_matched_by_depth(make_llama: MakeLlama) -> None:
    deep = load_transformers(make_llama("deep", num_hidden_layers=6), torch.float32, CPU)
    for layers, pairs in ((1, [(1, 6)]), (3, [(1, 2), (2, 4), (3, 6)])):
        flat = load_transformers(
            make_llama(f"flat{layers}", num_hidden_layers=layers), torch.float32, CPU
        )
        assert matched_layers(flat, deep) == pairs
    with pytest.raises(UnsupportedError, match="6 layers"):
        matched_layers(deep, flat)


def test_attention_can_be_seen(make_llama: MakeLlama) -> None:
    model = load_transformers(make_llama(), torch.float32, CPU)
    show_attention(model)
    maps = model(input_ids=torch.ones(1, 4, dtype=torch.int64), output_attentions=True).attentions
    assert len(maps) == 2 and torch.allclose(maps[0].sum(-1), torch.ones(1, 4, 4))


def taught(artifact: Artifact, windows: Windows, folder: Path) -> Windows:
    return taught_windows(
        artifact, windows, folder, temperature=1.0, seed=3, dtype=torch.float32, device=CPU
    )


def test_what_was_written_is_kept(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_llama()
    rows = torch.randint(1, 256, (90, 16), generator=torch.Generator().manual_seed(0))
    windows = split_windows(rows, "text", seed=0)
    whole = taught(artifact, windows, tmp_path / "whole")
    assert whole.train.shape == windows.train.shape and whole.hash != windows.hash
    assert torch.equal(whole.train[:, :8], windows.train[:, :8])
    assert torch.equal(whole.held_out, windows.held_out), "it stays the text's"
    parts = sorted((tmp_path / "whole").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    calls: list[int] = []
    write = room.written_windows

    def counting(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "written_windows", counting)
    again = taught(artifact, windows, tmp_path / "whole")
    assert len(calls) == 1 and torch.equal(again.train, whole.train) and again.hash == whole.hash
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    with pytest.raises(ResumeError, match="part-00000"):
        taught(artifact, windows, tmp_path / "whole")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.recipe.train import TrainSettings
from infopt.core.text.sources import calibration_text
from infopt.core.text.windows import token_stream
from infopt.core.training import data
from infopt.core.training.data import split_windows, training_windows

Make = Callable[..., Artifact]


def settings(file: Path, length: int = 64) -> TrainSettings:
    return TrainSettings(steps=1, sequence_length=length, text=str(file))


def rows_of(*parts: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for part in parts for row in part.tolist()}


def test_all_windows_of_the_text_come_once(make_llama: Make, calibration_file: Path) -> None:
    artifact = make_llama()
    found = training_windows(artifact, settings(calibration_file), seed=1)
    text = calibration_text(str(calibration_file))
    stream = token_stream(text, artifact.tokenizer(), chat=False)
    expected = stream[: len(stream) // 64 * 64].view(-1, 64)
    assert len(found.train) + len(found.held_out) == len(expected) > 500
    assert rows_of(found.train, found.held_out) == rows_of(expected)
    assert not rows_of(found.train) & rows_of(found.held_out)
    assert len(found.held_out) == -(-len(expected) // 20)
    assert found.name == "calibration.txt"
    assert not torch.equal(found.train[:4], expected[:4]), "shuffled"


def test_the_seed_alone_makes_the_order(make_llama: Make, calibration_file: Path) -> None:
    artifact = make_llama()
    first, same, other = (
        training_windows(artifact, settings(calibration_file), seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.train, same.train) and torch.equal(first.held_out, same.held_out)
    assert first.hash == same.hash != other.hash
    assert not torch.equal(first.held_out, other.held_out)


def test_each_window_begins_as_the_tokenizer_says(
    make_llama: Make, calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_llama()
    text = calibration_text(str(calibration_file))
    plain = token_stream(text, artifact.tokenizer(), chat=False)
    monkeypatch.setattr(data, "default_prefix", lambda tokenizer: [7])
    monkeypatch.setattr(
        data, "token_stream", lambda *args, **options: torch.cat([torch.tensor([7]), plain])
    )
    found = training_windows(artifact, settings(calibration_file), seed=1)
    assert bool((found.train[:, 0] == 7).all()) and bool((found.held_out[:, 0] == 7).all())
    expected = plain[: len(plain) // 63 * 63].view(-1, 63)
    assert rows_of(found.train[:, 1:], found.held_out[:, 1:]) == rows_of(expected)


def test_two_windows_are_the_least(make_llama: Make, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * 127)
    with pytest.raises(UsageError, match="127 tokens: not two windows of 64"):
        training_windows(make_llama(), settings(short), seed=0)
    rows = torch.arange(12).view(4, 3)
    found = split_windows(rows, "own", 0)
    assert (len(found.train), len(found.held_out)) == (3, 1)
    assert rows_of(found.train, found.held_out) == rows_of(rows)
    with pytest.raises(UsageError, match="1 windows"):
        split_windows(rows[:1], "own", 0)

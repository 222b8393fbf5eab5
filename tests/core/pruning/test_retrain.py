from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.pruning.mask import keeps_pattern
from infopt.core.pruning.prune import prune
from infopt.core.recipe.prune import PruneSettings, parse_pattern
from infopt.core.reports.prune import PruneReport

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
STEPS = 8


def settings(calibration_file: Path, **changes: Any) -> PruneSettings:
    calibration = {"text": str(calibration_file), "samples": 8, "sequence_length": 32}
    values = {
        "calibration": calibration,
        "dtype": "float32",
        "device": "cpu",
        "retrain": STEPS,
        "retrain_tokens": 512,
        "retrain_length": 64,
        "learning_rate": 3e-3,
    }
    return PruneSettings.model_validate(values | changes)


def same_but_for_time(a: PruneReport, b: PruneReport) -> bool:
    assert a.retraining is not None and b.retraining is not None
    timeless = {"seconds": 0.0, "resumed_steps": 0}
    return (
        a.retraining.model_copy(update=timeless) == b.retraining.model_copy(update=timeless)
        and a.perplexity == b.perplexity
    )


@pytest.mark.parametrize("source_of_loss", ["dense", "text"])
@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_it_learns_and_what_was_removed_stays_removed(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    source_of_loss: str,
    sparsity: str,
) -> None:
    source = make_llama()
    more = {"sparsity": sparsity, "method": "magnitude"}
    plain = settings(
        calibration_file,
        **more,
        retrain=0,
        retrain_tokens=4096,
        retrain_length=256,
        learning_rate=1e-4,
    )
    before = prune(source, tmp_path / "before", plain)
    wanted = settings(calibration_file, **more, retrain_from=source_of_loss)
    report = prune(source, tmp_path / "out", wanted)
    told = report.retraining
    assert told is not None and told.steps == len(told.losses) == STEPS
    assert told.source == source_of_loss and told.tokens > 0 and told.resumed_steps == 0
    assert told.losses[-1] < told.losses[0]
    assert told.held_out[-1].step == STEPS
    assert report.perplexity.pruned == before.perplexity.pruned
    assert report.perplexity.recovered is not None
    assert report.sparsity == before.sparsity
    assert report.logits_max_difference is not None and report.logits_max_difference < 1e-4
    pruned, written = read_artifact(tmp_path / "before"), read_artifact(tmp_path / "out")
    changed = []
    for row in report.layers:
        old, new = (a.tensor(f"{row.name}.weight") for a in (pruned, written))
        assert (new[old == 0] == 0).all()
        changed.append(not torch.equal(old, new))
        if sparsity == "2:4":
            assert keeps_pattern(new, parse_pattern("2:4"))
    assert all(changed)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(written.tensor(embedding), source.tensor(embedding))
    assert written.config == source.config and written.names() == source.names()
    load_transformers(written, torch.float32, CPU)
    assert not list(tmp_path.glob(".out*"))


def test_distilling_from_the_dense_model_brings_its_distribution_back(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    """Of a random model perplexity says nothing; the divergence that is minimized does."""
    wanted = settings(calibration_file, sparsity="0.7", retrain=30)
    report = prune(make_llama(), tmp_path / "out", wanted)
    assert report.retraining is not None
    losses = report.retraining.losses
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("stage", ["pruning layers", "training"])
def test_an_interrupted_retraining_continues_to_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, stage: str
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, method="sparsegpt")
    whole = prune(source, tmp_path / "whole", wanted)

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.done == (5 if stage == "training" else 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", wanted, progress=stop)
    assert not (tmp_path / "out").exists()
    report = prune(source, tmp_path / "out", wanted, resume=True)
    assert report.retraining is not None
    assert report.retraining.resumed_steps == (5 if stage == "training" else 0)
    assert report.resumed_blocks == (2 if stage == "training" else 1)
    assert same_but_for_time(report, whole)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert not list(tmp_path.glob(".out*"))


def test_conv1d_is_trained_and_stored_as_it_was(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path)
    for file in make_llama("tokenizer").path.glob("*token*"):
        shutil.copy(file, path)
    report = prune(read_artifact(path), tmp_path / "out", settings(calibration_file))
    model = load_transformers(read_artifact(tmp_path / "out"), torch.float32, CPU)
    for row in report.layers:
        weight = model.get_submodule(row.name).weight
        assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()

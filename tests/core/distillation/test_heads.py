from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from infopt.core.artifact.heads import HEADS, read_heads
from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.compression.quality import held_out
from infopt.core.distillation import backbone
from infopt.core.distillation.backbone import Backbone, HeadsLearner
from infopt.core.distillation.heads import make_heads, plan_heads
from infopt.core.errors import ResumeError, UnsupportedError, UsageError
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.recipe.distill import DistillSettings
from infopt.core.reports.medusa import MedusaReport

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def settings(text: Path, **changes: Any) -> DistillSettings:
    values: dict[str, Any] = {
        "medusa_heads": 2,
        "steps": 6,
        "sequence_length": 32,
        "batch_tokens": 256,
        "micro_tokens": 128,
        "learning_rate": 3e-3,
        "save_every": 1,
        "text": str(text),
        "device": "cpu",
        "dtype": "float32",
        "precision": "float32",
    }
    return DistillSettings.model_validate(values | changes)


@pytest.mark.parametrize(
    ("projection", "vocabulary"), [("shared", None), ("own", None), ("own", 20), ("own", 9999)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_report_counts_what_the_written_heads_guess(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    projection: str,
    vocabulary: int | None,
    layers: int,
) -> None:
    source = make_llama()
    wanted = settings(
        calibration_file,
        medusa_projection=projection,
        medusa_layers=layers,
        medusa_vocabulary=vocabulary,
    )
    report = make_heads(source, tmp_path / "heads", wanted)
    verify_manifest(tmp_path / "heads")
    assert not list(tmp_path.glob(".heads*")), "nothing is left beside the output"
    written = read_heads(tmp_path / "heads")
    assert written.shape.fingerprint == source.fingerprint() == report.base_fingerprint
    assert (written.shape.heads, written.shape.layers) == (2, layers)
    assert written.shape.shared == (projection == "shared")
    heads = written.tensors()
    tokens = heads.pop("token_map", None)
    if vocabulary is None:
        assert tokens is None and report.vocabulary == 256 and report.covered == 1.0
    else:
        assert tokens is not None and len(tokens) == report.vocabulary <= min(vocabulary, 256)
        share = torch.isin(held_out(source), tokens).double().mean()
        assert report.covered == pytest.approx(float(share))
    assert {value.dtype for value in heads.values()} == {torch.bfloat16}
    assert sum(value.numel() for value in heads.values()) == report.parameters
    guesses = _guesses(source, heads, layers, tokens)
    length = 32
    for k, row in enumerate(report.heads):
        right = [g[: length - k - 1] == w[k + 1 :] for g, w in zip(*guesses[k], strict=True)]
        assert row.head == k and row.top1 == pytest.approx(float(torch.cat(right).float().mean()))
        assert row.top1 <= row.top5 <= 1 and row.unigram_top1 <= row.unigram_top5 <= 1
    assert report.heads[0].agreement is None and 0 <= report.mean_run <= 2


def _guesses(
    source: Artifact, heads: dict[str, Tensor], layers: int, tokens: Tensor | None
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Every head's first guess and the tokens, window by window, computed without ours."""
    model = load_transformers(source, torch.float32, CPU)
    stream = held_out(source)
    windows = stream[: len(stream) // 32 * 32].view(-1, 32)
    states = model(input_ids=windows, output_hidden_states=True).hidden_states[-1]
    table = model.get_output_embeddings().weight
    found = [(list((states @ table.T).argmax(-1)), list(windows))]
    for head in range(2):
        x = states
        for layer in range(layers):
            name = f"blocks.{head}.layers.{layer}"
            x = x + F.silu(x @ heads[f"{name}.weight"].float().T + heads[f"{name}.bias"].float())
        own = heads.get(f"lm_heads.{head}.weight", table).float()
        said = (x @ own.T).argmax(-1)
        found.append((list(said if tokens is None else tokens[said]), list(windows)))
    return found


def test_heads_learn_and_their_base_does_not(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    before = source.fingerprint()
    wanted = settings(calibration_file, steps=40, medusa_targets="text", learning_rate=1e-2)
    report = make_heads(source, tmp_path / "heads", wanted)
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert report.held_out[0].step == 0 and report.held_out[-1].step == 40
    assert report.held_out[-1].loss < 0.8 * report.held_out[0].loss
    assert source.fingerprint() == before


def test_targets_are_the_bases_own_greedy_tokens(make_llama: MakeLlama) -> None:
    base = Backbone(load_transformers(make_llama(), torch.float32, CPU))
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    tokens[0, 12:] = -1
    logits = base.model(input_ids=tokens.clamp(min=0)).logits
    greedy, text = (
        HeadsLearner(base, 1, 1, own=False, targets=word).loss(tokens)["head 1"]
        for word in ("greedy", "text")
    )
    own = logits.argmax(-1)
    own[0, 12:] = -1
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), own[:, 1:].flatten(), ignore_index=-1)
    assert float(greedy.detach()) == pytest.approx(float(wanted), rel=1e-5)
    wanted = F.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten(), ignore_index=-1)
    assert float(text.detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_heads_are_not_asked_for_what_they_cannot_say(make_llama: MakeLlama) -> None:
    base = Backbone(load_transformers(make_llama(), torch.float32, CPU))
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    few = torch.arange(0, 256, 3)
    learner = HeadsLearner(base, 1, 1, own=True, targets="text", tokens=few)
    logits = base.model(input_ids=tokens).logits[:, :-2, few]
    follow = tokens[:, 2:]
    wanted = F.cross_entropy(
        logits.flatten(0, 1),
        torch.where(follow % 3 == 0, follow // 3, -1).flatten(),
        ignore_index=-1,
    )
    assert float(learner.loss(tokens)["loss"].detach()) == pytest.approx(0.8 * float(wanted))


def test_windows_that_come_again_are_not_computed_again(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Backbone(load_transformers(make_llama(), torch.float32, CPU))
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    learner = HeadsLearner(base, 2, 1, own=True, targets="greedy")
    first = float(learner.loss(tokens)["loss"].detach())
    turned = float(learner.loss(tokens[[2, 0, 1]])["loss"].detach())
    monkeypatch.setattr(base, "states", None)
    assert float(learner.loss(tokens)["loss"].detach()) == first == pytest.approx(turned)
    monkeypatch.undo()
    monkeypatch.setattr(backbone, "_KEPT_BYTES", 0)
    forgetful = HeadsLearner(base, 2, 1, own=True, targets="greedy")
    assert float(forgetful.loss(tokens)["loss"].detach()) == first
    monkeypatch.setattr(base, "states", None)
    with pytest.raises(TypeError):
        forgetful.loss(tokens)


def test_heads_that_foresee_begin_nearer_to_their_targets(make_llama: MakeLlama) -> None:
    """On the windows that they were fitted to; what is no token has no part in it."""
    base = Backbone(load_transformers(make_llama(), torch.float32, CPU))
    tokens = torch.randint(256, (6, 32), generator=torch.Generator().manual_seed(0))
    plain, foretold, padded = (
        HeadsLearner(base, 2, 1, own=True, targets="greedy") for _ in range(3)
    )
    foretold.foresee(tokens, 64)
    before, after = plain.loss(tokens), foretold.loss(tokens)
    for name in ("head 1", "head 2"):
        assert float(after[name].detach()) < 0.97 * float(before[name].detach())
    filler = torch.full((6, 8), -1)
    padded.foresee(torch.cat([tokens, filler], dim=1), 40)
    for name, value in foretold.parameters().items():
        torch.testing.assert_close(padded.parameters()[name], value, atol=1e-4, rtol=1e-3)


def test_untrained_heads_repeat_the_base(make_llama: MakeLlama) -> None:
    base = Backbone(load_transformers(make_llama(), torch.float32, CPU))
    learner = HeadsLearner(base, 3, 2, own=True, targets="text")
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    found = learner.ranks(tokens, 5)
    assert len(found.text) == 4
    # All say the same, and are asked for tokens one further on each.
    own = base.model(input_ids=tokens).logits.argmax(-1)
    for k, places in enumerate(found.text):
        right = (places == 0)[:, : 16 - k - 1]
        assert torch.equal(right, own[:, : 16 - k - 1] == tokens[:, k + 1 :])
    assert bool((found.base[0] == 0).all())


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    ],
    ids=["softcap", "scale"],
)
def test_what_follows_lm_head_follows_the_heads(model: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    base = Backbone(model().eval())
    tokens = torch.randint(97, (2, 9))
    mine = base.projection.logits(base.states(tokens))
    with torch.no_grad():
        assert torch.allclose(mine, base.model(input_ids=tokens).logits, atol=1e-5)
    assert base.projection.softcap == 2.0 or base.projection.scale == 0.25


def test_logits_of_unknown_making_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model.config.logit_scale = 7.0
    with pytest.raises(UnsupportedError, match="lm_head"):
        Backbone(model)


def test_an_interrupted_training_goes_on_to_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, wanted = make_llama(), settings(calibration_file)
    whole = make_heads(source, tmp_path / "whole", wanted)

    def stop(progress: Progress) -> None:
        if progress.stage == "training" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_heads(source, tmp_path / "heads", wanted, progress=stop)
    with pytest.raises(ResumeError, match="unfinished"):
        make_heads(source, tmp_path / "heads", wanted)
    with pytest.raises(ResumeError, match="medusa_heads"):
        other = wanted.model_copy(update={"medusa_heads": 3})
        make_heads(source, tmp_path / "heads", other, resume=True)
    report = make_heads(source, tmp_path / "heads", wanted, resume=True)
    assert report.resumed_steps == 3 and report.steps == 6
    assert report.losses == whole.losses and report.heads == whole.heads
    written = [(tmp_path / name / HEADS).read_bytes() for name in ("whole", "heads")]
    assert written[0] == written[1]


def test_a_head_that_looks_beyond_its_window_is_refused(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    wanted = settings(calibration_file, medusa_heads=7, sequence_length=8)
    with pytest.raises(UsageError, match="too short"):
        make_heads(make_llama(), tmp_path / "heads", wanted)
    assert not list(tmp_path.glob("*heads*"))


def test_the_plan_says_what_will_be_made(make_llama: MakeLlama, calibration_file: Path) -> None:
    plan = plan_heads(make_llama(), settings(calibration_file))
    assert plan.command == "distill" and plan.memory_bytes > 0 and plan.disk_bytes > 0
    assert f"{2 * (64 * 64 + 64):,} parameters" in plan.actions[0]


def test_heads_no_better_than_the_commonest_token_are_warned_of(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    report = make_heads(make_llama(), tmp_path / "heads", settings(calibration_file, steps=1))
    poor = [row.head for row in report.heads[1:] if row.top1 <= row.unigram_top1]
    assert len(report.warnings) == len(poor) > 0
    assert isinstance(report, MedusaReport) and "train for more steps" in report.warnings[0]


def test_heads_of_another_model_are_told(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    make_heads(make_llama(), tmp_path / "heads", settings(calibration_file, steps=1))
    heads = read_heads(tmp_path / "heads")
    heads.check_fits(64, 256)
    replace(heads, path=tmp_path).check_fits(64, 256)
    with pytest.raises(UsageError, match="trained on tiny"):
        heads.check_fits(128, 256)

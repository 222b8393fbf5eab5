"""A tiny model that learns: from what, which of its weights, with what held."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.recipe.train import TrainSettings
from infopt.core.training.causal import CausalLearner, held_out_nll
from infopt.core.training.data import Windows, split_windows
from infopt.core.training.loop import TrainResult, train

CPU = torch.device("cpu")
Make = Callable[..., Artifact]
SETTINGS = TrainSettings(
    steps=4,
    learning_rate=0.01,
    batch_tokens=64,
    micro_tokens=32,
    sequence_length=16,
    save_every=2,
    precision="float32",
)
DOWN = "model.layers.0.mlp.down_proj.weight"


def load(artifact: Artifact) -> PreTrainedModel:
    return load_transformers(artifact, torch.float32, CPU)


def some_windows(count: int = 12) -> Windows:
    """Counting, from anywhere in any step."""
    start, step = torch.arange(count)[:, None], 1 + torch.arange(count)[:, None] % 3
    return split_windows((start + step * torch.arange(16)) % 256, "counting", 0)


def go(learner: CausalLearner, settings: TrainSettings = SETTINGS, **options: Any) -> TrainResult:
    given: dict[str, Any] = {"seed": 0, "device": CPU, "identity": {}, "folder": None}
    return train(learner, some_windows(), settings, **(given | options))


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_text_alone_is_cross_entropy(make_llama: Make) -> None:
    model = load(make_llama())
    tokens = some_windows().train[:3].clone()
    tokens[1, 9:] = -1
    parts = CausalLearner(model).loss(tokens)
    with torch.no_grad():
        each = [
            functional.cross_entropy(
                model(input_ids=row[row >= 0][None, :-1]).logits[0],
                row[row >= 0][1:],
                reduction="sum",
            )
            for row in tokens
        ]
    expected = torch.stack(each).sum() / int((tokens[:, 1:] >= 0).sum())
    assert set(parts) == {"loss", "cross_entropy"}
    torch.testing.assert_close(parts["loss"].detach(), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_is_the_share_of_the_divergence(alpha: float, make_llama: Make) -> None:
    model, teacher = load(make_llama()), load(make_llama("teacher", hidden_size=64))
    tokens = some_windows().train[:3].clone()
    tokens[1, 9:] = -1
    learner = CausalLearner(model, teacher=teacher, kind="reverse-kl", temperature=2.0, alpha=alpha)
    parts = learner.loss(tokens)
    kept = tokens[:, 1:] >= 0
    with torch.no_grad():
        q, p = (
            (m(input_ids=tokens[:, :-1].clamp(min=0)).logits[kept] / 2).log_softmax(-1)
            for m in (model, teacher)
        )
    soft = functional.kl_div(p, q, log_target=True, reduction="batchmean") * 4
    hard = CausalLearner(model).loss(tokens)["loss"].detach()
    torch.testing.assert_close(parts["loss"].detach(), alpha * soft + (1 - alpha) * hard)
    assert ("divergence" in parts, "cross_entropy" in parts) == (alpha > 0, alpha < 1)
    parts["loss"].backward()
    assert all(value.grad is None for value in teacher.parameters())
    assert all(value.grad is not None for value in model.parameters())


def test_it_learns_and_the_held_out_text_says_so(make_llama: Make) -> None:
    model = load(make_llama())
    learner, windows = CausalLearner(model), some_windows()
    before = held_out_nll(model, windows)
    result = go(
        learner,
        SETTINGS.model_copy(update={"steps": 40}),
        evaluate=lambda: held_out_nll(model, windows),
    )
    assert result.held_out[0] == (0, before)
    assert result.held_out[-1] == (40, held_out_nll(model, windows))
    assert result.held_out[-1][1] < before - 1
    assert result.losses[-1]["loss"] < result.losses[0]["loss"] - 1


def test_held_out_nll_is_the_mean_over_scored_tokens(make_llama: Make) -> None:
    model, windows = load(make_llama()), some_windows(200)
    windows.held_out[2, 5:] = -1
    total = 0.0
    for row in windows.held_out:
        known = row[row >= 0]
        with torch.no_grad():
            log_p = model(input_ids=known[None]).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_p.gather(-1, known[1:, None]).sum())
    scored = int((windows.held_out[:, 1:] >= 0).sum())
    assert held_out_nll(model, windows) == pytest.approx(total / scored, rel=1e-5)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(NumericsError, match="held-out"):
        held_out_nll(model, windows)


def test_only_what_is_named_learns_and_tied_weights_are_one(make_llama: Make) -> None:
    model = load(make_llama())
    learner = CausalLearner(model, trained=[DOWN, "lm_head.weight"])
    assert list(learner.parameters()) == ["model.embed_tokens.weight", DOWN]
    before = values(model)
    go(learner)
    different = {name for name, old in before.items() if not model.get_parameter(name).equal(old)}
    assert different == {"model.embed_tokens.weight", DOWN}
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    untied = load(make_llama("untied", tie_word_embeddings=False))
    assert len(CausalLearner(untied).parameters()) == len(CausalLearner(model).parameters()) + 1


def test_masks_hold_through_momentum_and_decay(make_llama: Make) -> None:
    model = load(make_llama())
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(value.shape, generator=generator) < 0.5
        for name, value in model.named_parameters()
        if value.ndim == 2
    }
    learner = CausalLearner(model, masks=masks)
    for name, mask in masks.items():
        assert not bool(model.get_parameter(name).detach()[~mask].any()), "from the first on"
    before = values(model)
    seen: list[float] = []

    def look(_: Progress) -> None:
        for name, mask in masks.items():
            value = model.get_parameter(name)
            seen.append(float(value.detach()[~mask].abs().max()))
            if value.grad is not None:
                seen.append(float(value.grad[~mask].abs().max()))

    go(learner, SETTINGS.model_copy(update={"weight_decay": 0.5}), progress=look)
    assert seen and max(seen) == 0.0
    for name, mask in masks.items():
        changed = model.get_parameter(name).detach() != before[name]
        assert bool(changed.any()) and not bool((changed & ~mask).any())


def test_recomputed_blocks_give_the_same_gradients(make_llama: Make) -> None:
    artifact = make_llama()
    tokens = some_windows().train[:2]
    plain, thrifty = (CausalLearner(load(artifact)) for _ in range(2))
    calls: list[int] = []
    # As it begins: the second time torch breaks off once it has all that the gradients need.
    thrifty.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    thrifty.recompute()
    thrifty.recompute()
    for learner in (plain, thrifty):
        learner.loss(tokens)["loss"].backward()
    assert len(calls) == 2, "once forward, once back"
    for name, value in plain.parameters().items():
        found = thrifty.parameters()[name].grad
        assert found is not None and value.grad is not None
        torch.testing.assert_close(found, value.grad)


def gpt2(folder: Path) -> Artifact:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return read_artifact(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recomputing", [False, True])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    family: str, recomputing: bool, make_llama: Make, tmp_path: Path
) -> None:
    """GPT-2's weights lie transposed in memory, and its training has dropout elsewhere."""
    artifact = make_llama() if family == "llama" else gpt2(tmp_path / "gpt2")
    settings = SETTINGS.model_copy(update={"steps": 6, "gradient_checkpointing": recomputing})

    def learner() -> CausalLearner:
        return CausalLearner(load(artifact), teacher=load(artifact), kind="jsd", alpha=0.5)

    whole, cut, again = learner(), learner(), learner()
    expected = go(whole, settings)

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(cut, settings, folder=tmp_path / "state", progress=stop)
    found = go(again, settings, folder=tmp_path / "state")
    assert found.resumed == 3 and found.losses == expected.losses
    for name, value in whole.parameters().items():
        assert torch.equal(again.parameters()[name], value), name


def test_mistakes_are_told(make_llama: Make) -> None:
    model = load(make_llama())
    with pytest.raises(ValueError, match="no parameter nonsense"):
        CausalLearner(model, trained=["nonsense"])
    with pytest.raises(ValueError, match="another shape"):
        CausalLearner(model, masks={DOWN: torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="alpha"):
        CausalLearner(model, alpha=1.5)
    with pytest.raises(ValueError, match="float32"):
        CausalLearner(load_transformers(make_llama("half"), torch.bfloat16, CPU))
    other = load(make_llama("other", vocab_size=300))
    with pytest.raises(UnsupportedError, match="knows 256 tokens, its teacher 300"):
        CausalLearner(model, teacher=other).loss(some_windows().train[:1])

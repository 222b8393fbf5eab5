from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from infopt.core.artifact.read import Artifact
from infopt.core.errors import NumericsError, ResumeError, UnsupportedError, UsageError
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.quantization import qat
from infopt.core.quantization.gptq import gptq
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.qat import QatResult, QatSettings, qat_memory, train
from infopt.core.training.distillation import distillation_loss

CPU = torch.device("cpu")
FORM = IntegerFormat(2, False, 32)
SETTINGS = QatSettings(
    steps=12, learning_rate=0.02, batch_tokens=64, micro_tokens=32, save_every=5, seed=3, pull=1.0
)
Make = Callable[..., Artifact]


@pytest.fixture
def artifact(make_llama: Make) -> Artifact:
    """Its weights are large enough for its predictions to differ from one another."""
    return make_llama(initializer_range=0.15)


def tokens(count: int = 6) -> Tensor:
    return torch.randint(1, 256, (count, 16), generator=torch.Generator().manual_seed(2))


def forms(artifact: Artifact, form: IntegerFormat = FORM) -> dict[str, IntegerFormat]:
    model = load_transformers(artifact, torch.float32, CPU)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: form for name in names if name != "lm_head"}


def run(artifact: Artifact, settings: QatSettings = SETTINGS, **options: Any) -> QatResult:
    given: dict[str, Any] = {"dtype": torch.float32, "device": CPU} | options
    wanted = given.pop("forms", None) or forms(artifact)
    return train(artifact, wanted, given.pop("tokens", tokens()), settings, **given)


def rounded(artifact: Artifact, form: IntegerFormat = FORM) -> dict[str, QuantizedWeight]:
    model = load_transformers(artifact, torch.float32, CPU)
    weights = {name: model.get_submodule(name).weight for name in forms(artifact)}
    return {
        name: quantize_nearest(weight, form, group_grids(weight, form, mse=True))
        for name, weight in weights.items()
    }


def loss_of(artifact: Artifact, weights: dict[str, QuantizedWeight], **others: Tensor) -> float:
    """KL from the original on all windows, from what would be stored."""
    model = load_transformers(artifact, torch.float32, CPU)
    stand_ins = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
    with torch.no_grad():
        wanted = model(tokens()).logits
        found = functional_call(model, stand_ins | others, (tokens(),)).logits
    return float(distillation_loss(found.flatten(0, 1), wanted.flatten(0, 1)))


@pytest.mark.parametrize("form", [FORM, IntegerFormat(3, True, None)])
def test_training_lowers_the_loss_of_what_is_stored(
    artifact: Artifact, form: IntegerFormat
) -> None:
    result = run(artifact, replace(SETTINGS, steps=40), forms=forms(artifact, form))
    before = loss_of(artifact, rounded(artifact, form))
    after = loss_of(artifact, result.weights, **result.others)
    assert after < 0.8 * before
    assert len(result.losses) == 40
    assert min(result.losses[-6:]) < min(result.losses[:6])
    for weight in result.weights.values():
        assert weight.format == form
        assert int(weight.codes.max()) <= form.max_code
        assert weight.scales.dtype == torch.float16 and bool((weight.scales > 0).all())
        assert torch.equal(weight.scales, weight.scales.to(torch.bfloat16).to(torch.float16))


def test_codes_scales_norms_learn_and_nothing_else(artifact: Artifact) -> None:
    result = run(artifact)
    model = load_transformers(artifact, torch.float32, CPU)
    begun = rounded(artifact)
    for name, weight in result.weights.items():
        assert not torch.equal(weight.codes, begun[name].codes), name
        assert not torch.equal(weight.scales, begun[name].scales), name
        assert torch.equal(weight.zeros, begun[name].zeros)
    norms = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert set(result.others) == norms and len(norms) == 5
    for name, value in result.others.items():
        assert not torch.equal(value, model.get_parameter(name)), name


@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_no_step_gives_the_beginning_exactly(artifact: Artifact, pull: float) -> None:
    settings = replace(SETTINGS, steps=0, pull=pull)
    begun = rounded(artifact)
    for result in (run(artifact, settings), run(artifact, settings, initial=begun)):
        for name, weight in result.weights.items():
            for part in ("codes", "scales", "zeros"):
                assert torch.equal(getattr(weight, part), getattr(begun[name], part))


def test_it_begins_at_codes_that_are_not_the_nearest(artifact: Artifact) -> None:
    """GPTQ's codes are kept though rounding would choose others."""
    model = load_transformers(artifact, torch.float32, CPU)
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach()
    inputs = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    inputs = inputs @ torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
    begun = gptq(weight, inputs.T @ inputs, FORM, group_grids(weight, FORM, mse=True)).weight
    assert not torch.equal(begun.codes, rounded(artifact)[name].codes)
    result = run(artifact, replace(SETTINGS, steps=0), initial={name: begun})
    assert torch.equal(result.weights[name].codes, begun.codes)
    assert torch.equal(result.weights[name].scales, begun.scales)


def test_micro_batches_give_the_same_as_whole_ones(artifact: Artifact) -> None:
    settings = replace(SETTINGS, steps=3)
    parts = run(artifact, settings)
    whole = run(artifact, replace(settings, micro_tokens=64))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)


@pytest.mark.parametrize("stop", [5, 11])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    artifact: Artifact, tmp_path: Path, stop: int
) -> None:
    expected = run(artifact)

    def interrupt(progress: Progress) -> None:
        if progress.done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(artifact, folder=tmp_path / "qat", progress=interrupt)
    seen: list[Progress] = []
    found = run(artifact, folder=tmp_path / "qat", progress=seen.append)
    assert seen[0].done == seen[0].resumed == stop // 5 * 5
    assert seen[0].note.startswith("loss ")
    assert found.losses == expected.losses
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes)
        assert torch.equal(found.weights[name].scales, weight.scales)
    for name, value in expected.others.items():
        assert torch.equal(found.others[name], value)
    suffixes = {path.suffix for path in (tmp_path / "qat").iterdir()}
    assert suffixes == {"", ".safetensors"}, "no pickle"


def test_other_work_in_the_folder_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    run(artifact, replace(SETTINGS, steps=6), folder=tmp_path)
    with pytest.raises(ResumeError, match="learning_rate"):
        run(artifact, replace(SETTINGS, steps=6, learning_rate=1.0), folder=tmp_path)
    with pytest.raises(ResumeError, match="tokens"):
        run(artifact, replace(SETTINGS, steps=6), folder=tmp_path, tokens=tokens(5))
    other = rounded(artifact)
    with pytest.raises(ResumeError, match="start"):
        run(artifact, replace(SETTINGS, steps=6), folder=tmp_path, initial=other)


def test_a_loss_that_is_not_finite_names_its_step(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Tensor] = []

    def poisoned(*args: Any) -> Tensor:
        steps.append(distillation_loss(*args))
        return steps[-1] * (torch.nan if len(steps) == 5 else 1.0)

    monkeypatch.setattr(qat, "distillation_loss", poisoned)
    with pytest.raises(NumericsError, match="loss of step 3 is not finite"):
        run(artifact)  # of two passes a step, the fifth is the third step's first


def test_cross_entropy_takes_its_share(artifact: Artifact) -> None:
    soft, hard = (run(artifact, replace(SETTINGS, steps=1, hard=h)).losses[0] for h in (0.0, 1.0))
    model = load_transformers(artifact, torch.float32, CPU)
    stand_ins = {f"{n}.weight": w.dequantize() for n, w in rounded(artifact).items()}
    chosen = tokens()[qat.windows_of_step(0, 4, 6, SETTINGS.seed)]
    with torch.no_grad():
        logits = functional_call(model, stand_ins, (chosen,)).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chosen[:, 1:].flatten())
    assert hard == pytest.approx(float(expected), rel=1e-4)
    assert soft != pytest.approx(hard, rel=1e-2)


def test_bfloat16_trains_too(artifact: Artifact) -> None:
    result = run(artifact, replace(SETTINGS, steps=40), dtype=torch.bfloat16)
    after = loss_of(artifact, result.weights, **result.others)
    assert after < 0.8 * loss_of(artifact, rounded(artifact))


def test_what_it_cannot_begin_at_is_refused(artifact: Artifact) -> None:
    begun = rounded(artifact)
    name = next(iter(begun))
    scattered = replace(begun[name], group_index=begun[name].group_index.flip(0))
    with pytest.raises(UnsupportedError, match="scattered"):
        run(artifact, initial={name: scattered})
    other = IntegerFormat(2, True, 32)
    with pytest.raises(UnsupportedError, match="another format"):
        run(artifact, initial={name: begun[name]}, forms=forms(artifact, other))
    with pytest.raises(UsageError, match="calibration text"):
        run(artifact, tokens=tokens()[:0])


def test_memory_counts_what_is_held() -> None:
    assert qat_memory(1000) == 28_000
    assert qat_memory(1000, dtype_bytes=2, micro_tokens=10, vocabulary=7) == 22_000 + 3 * 140

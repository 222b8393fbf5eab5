"""What models write themselves: as transformers would, repeatable, of the newest weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.distillation.on_policy import drawn, learning, prompt_length, written_windows
from infopt.core.errors import UnsupportedError
from infopt.core.models.hf import load_transformers

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
WINDOWS = torch.randint(1, 256, (5, 21), generator=torch.Generator().manual_seed(0))


def written(artifact: Artifact, temperature: float, seed: int = 0) -> Tensor:
    seeds = list(range(seed, seed + len(WINDOWS)))
    return written_windows(
        artifact, WINDOWS, seeds, temperature=temperature, dtype=torch.float32, device=CPU
    )


def test_greedy_text_is_that_of_transformers(make_llama: MakeLlama) -> None:
    artifact = make_llama(lively=True)
    model = load_transformers(artifact, torch.float32, CPU)
    given = prompt_length(21)
    again = model.generate(
        WINDOWS[:, :given],
        max_new_tokens=21 - given,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(written(artifact, 0.0), again)


def test_sampled_text_depends_on_the_seed_alone(make_llama: MakeLlama) -> None:
    artifact = make_llama()
    one, same, other = written(artifact, 1.0), written(artifact, 1.0), written(artifact, 1.0, 9)
    assert torch.equal(one, same) and not torch.equal(one, other)
    given = prompt_length(21)
    assert torch.equal(one[:, :given], WINDOWS[:, :given]) and one.shape == WINDOWS.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(written(artifact, 1.0), one)


def test_the_newest_weights_write(make_llama: MakeLlama) -> None:
    artifact = make_llama(lively=True)
    model = load_transformers(artifact, torch.float32, CPU)
    assert torch.equal(written(learning(artifact, model), 0.0), written(artifact, 0.0))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").neg_()
    newest = learning(artifact, model)
    given = prompt_length(21)
    again = load_transformers(newest, torch.float32, CPU).generate(
        WINDOWS[:, :given],
        max_new_tokens=21 - given,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = written(newest, 0.0)
    assert torch.equal(found, again) and not torch.equal(found, written(artifact, 0.0))


def test_what_is_drawn_is_a_share_and_repeatable() -> None:
    chosen, seeds = drawn(2000, 0.3, seed=1, step=5, part=2)
    again, same = drawn(2000, 0.3, seed=1, step=5, part=2)
    assert torch.equal(chosen, again) and seeds == same and len(set(seeds)) == 2000
    assert abs(float(chosen.double().mean()) - 0.3) < 0.04
    for other in ({"seed": 2}, {"step": 6}, {"part": 3}):
        numbers = {"seed": 1, "step": 5, "part": 2} | other
        assert not torch.equal(drawn(2000, 0.3, **numbers)[0], chosen)
    assert not drawn(50, 0.0, 0, 0, 0)[0].any() and drawn(50, 1.0, 0, 0, 0)[0].all()


def test_a_model_that_the_runtime_does_not_know_is_refused(make_llama: MakeLlama) -> None:
    artifact = make_llama()
    artifact.config["architectures"] = ["BloomForCausalLM"]
    with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
        written(artifact, 1.0)

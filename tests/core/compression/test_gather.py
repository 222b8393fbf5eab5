"""Statistics of layers' inputs on a walk, against their definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.gather import gather
from infopt.core.compression.statistics import InputStatistics
from infopt.core.compression.targets import find_targets
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError

MakeModel = Callable[[str], Artifact]
DATA = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(1))
# Batches of unequal sizes: a mean over batches would be another than that over tokens.
BATCHES = (DATA[:2], DATA[2:4], DATA[4:])


def started(artifact: Artifact, **how: Any) -> Walk:
    """A walk with its first block loaded."""
    walk = Walk(artifact, DATA[:1, :8], BATCHES, torch.float32, torch.device("cpu"), **how)
    walk.start()
    walk.load()
    return walk


def groups_of(walk: Walk) -> list[tuple[str, ...]]:
    blocks = find_targets(walk.model, ("lm_head",))
    return walk.input_groups(blocks[walk.position].targets)


def rows_of(walk: Walk, name: str) -> Tensor:
    """All inputs of a layer, float64 [rows, K]."""
    return torch.cat([found[name].flatten(0, -2) for found in walk.inputs([name])]).double()


def close(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None and found.dtype == torch.float32
    scale = float(expected.abs().max())
    return bool((found.double() - expected).abs().max() <= 1e-5 * scale)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_statistics_are_those_of_all_tokens(make_model: MakeModel, family: str) -> None:
    walk = started(make_model(family))
    groups = groups_of(walk)
    found = gather(walk, groups, ranges=True)
    assert list(found) == groups
    for group, statistics in found.items():
        rows = rows_of(walk, group[0])
        assert statistics.rows == len(rows) == DATA.numel()
        assert close(statistics.hessian, 2 * rows.T @ rows / len(rows))
        assert torch.equal(statistics.hessian, statistics.hessian.T)
        assert close(statistics.abs_mean, rows.abs().mean(dim=0))
        assert close(statistics.abs_max, rows.abs().amax(dim=0))
        assert statistics.drift is None


def test_a_sample_is_some_of_the_rows_of_every_batch(make_model: MakeModel) -> None:
    walk = started(make_model("llama"))
    group = groups_of(walk)[0]
    sample = gather(walk, [group], ranges=True)[group].sample
    assert sample is not None and 1 <= len(sample) <= 512
    begin = 0
    rows = rows_of(walk, group[0]).float()
    for batch in BATCHES:
        end = begin + batch.numel()
        equal = (sample[:, None] == rows[None, begin:end]).all(dim=-1)
        assert bool(equal.any()), "each batch has its share"
        begin = end
    known = (sample[:, None] == rows[None]).all(dim=-1).any(dim=1)
    assert bool(known.all())


def test_only_what_is_asked_for_is_gathered(make_model: MakeModel) -> None:
    walk = started(make_model("llama"))
    groups = groups_of(walk)
    for statistics in gather(walk, groups[:2]).values():
        assert statistics.abs_mean is statistics.abs_max is statistics.sample is None
    assert list(gather(walk, groups[1:2])) == groups[1:2]


@torch.no_grad()
def test_drift_is_how_far_the_inputs_are_off_the_original_models(make_model: MakeModel) -> None:
    artifact = make_model("llama")
    walk, reference = started(artifact), started(artifact)
    groups = groups_of(walk)
    same = gather(walk, groups, reference=reference)
    assert all(not s.drift.any() for s in same.values() if s.drift is not None)
    value = walk.layer(f"{walk.names[0]}.self_attn.v_proj").weight
    value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    found = gather(walk, groups, reference=reference)
    for number, (group, statistics) in enumerate(found.items()):
        rows, originals = rows_of(walk, group[0]), rows_of(reference, group[0])
        expected = 2 * (originals - rows).T @ rows / len(rows)
        assert statistics.drift is not None
        if number == 0:
            assert not statistics.drift.any(), "nothing before q, k and v has changed"
        else:
            assert bool(expected.any()) and close(statistics.drift, expected)
        assert close(statistics.hessian, 2 * rows.T @ rows / len(rows)), "of its own inputs"


def test_the_drift_is_gathered_in_later_blocks_too(make_model: MakeModel) -> None:
    artifact = make_model("llama")
    walk, reference = started(artifact), started(artifact)
    with torch.no_grad():
        walk.layer(f"{walk.names[0]}.mlp.down_proj").weight.mul_(0.9)
    for each in (walk, reference):
        each.advance()
        each.load()
    group = groups_of(walk)[0]
    found = gather(walk, [group], reference=reference)[group]
    rows, originals = rows_of(walk, group[0]), rows_of(reference, group[0])
    assert close(found.drift, 2 * (originals - rows).T @ rows / len(rows))


def test_divided_statistics_are_those_of_divided_inputs(make_model: MakeModel) -> None:
    walk = started(make_model("llama"))
    reference = started(make_model("llama"))
    with torch.no_grad():
        walk.layer(f"{walk.names[0]}.self_attn.v_proj").weight.mul_(1.1)
    group = groups_of(walk)[1]
    found = gather(walk, [group], ranges=True, reference=reference)[group]
    rows, originals = rows_of(walk, group[0]), rows_of(reference, group[0])
    scales = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    divided = found.divided(scales)
    rows, originals = rows / scales, originals / scales
    assert close(divided.hessian, 2 * rows.T @ rows / len(rows))
    assert close(divided.abs_mean, rows.abs().mean(dim=0))
    assert close(divided.abs_max, rows.abs().amax(dim=0))
    assert close(divided.drift, 2 * (originals - rows).T @ rows / len(rows))
    assert found.sample is not None and divided.sample is not None
    assert torch.equal(divided.sample, found.sample / scales) and divided.rows == found.rows


def mixture(folder: Path) -> Artifact:
    """Four experts in a block, of which a token sees two."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return read_artifact(folder)


def by_expert(walk: Walk) -> dict[str, InputStatistics]:
    found = gather(walk, groups_of(walk), ranges=True)
    return {group[0]: s for group, s in found.items() if ".experts." in group[0]}


def test_experts_see_what_is_routed_to_them_or_all(tmp_path: Path) -> None:
    from infopt.core.models.unfused import unfused

    artifact = mixture(tmp_path / "mixtral")
    routed, every = (
        by_expert(started(unfused(started(artifact).model, artifact), experts=how))
        for how in ("routed", "all")
    )
    tokens = DATA.numel()
    assert len(routed) == 8, "of each expert, what gate and up share, and what down sees"
    assert len(every) == 5, "gate and up of all experts see the same"
    assert all(s.rows == tokens for s in every.values())
    gates = [s.rows for name, s in routed.items() if not name.endswith("down_proj")]
    assert sum(gates) == 2 * tokens, "two experts a token"
    for name, statistics in routed.items():
        assert 0 < statistics.rows < tokens, name


def test_a_layer_that_no_token_reaches_has_no_rows(make_model: MakeModel) -> None:
    walk = started(make_model("llama"))
    groups = groups_of(walk)
    walk.tokens = walk.tokens[:1]
    for statistics in gather(walk, groups, ranges=True).values():
        assert statistics.rows == 0 and not statistics.hessian.any()
        assert statistics.abs_mean is statistics.abs_max is statistics.sample is None


def test_inputs_that_are_not_finite_are_named(make_model: MakeModel) -> None:
    artifact = make_model("llama")
    file = artifact.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.v_proj.weight"].fill_(1e30)
    save_file(tensors, file, metadata={"format": "pt"})
    walk = started(read_artifact(artifact.path))
    groups = groups_of(walk)
    gather(walk, groups[:1])
    with pytest.raises(NumericsError, match=r"reach model\.layers\.0\.self_attn\.o_proj"):
        gather(walk, groups)

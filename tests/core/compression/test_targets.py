import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.jetmoe import JetMoeConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from infopt.core.artifact.read import Artifact
from infopt.core.compression.targets import (
    Target,
    choose_group_size,
    find_routers,
    find_targets,
    stages,
)
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.models.conv1d import linearize
from infopt.core.models.experts import unfuse
from infopt.core.models.hf import skeleton


def targets_of(*columns: int) -> list[Target]:
    return [Target(f"layer{i}", 64, size) for i, size in enumerate(columns)]


def test_targets_are_the_linears_of_the_blocks(make_model: Callable[[str], Artifact]) -> None:
    found = find_targets(skeleton(make_model("llama")), ("lm_head",))
    assert [block.name for block in found] == [f"model.layers.{i}" for i in range(3)]
    assert len(found[0].targets) == 7
    assert found[1].targets[0] == Target("model.layers.1.self_attn.q_proj", 32, 32)


def test_patterns_leave_layers_out(make_model: Callable[[str], Artifact]) -> None:
    model = skeleton(make_model("llama"))
    found = find_targets(model, ("lm_head", "*.down_proj", "model.layers.0.*"))
    assert found[0].targets == () and len(found[1].targets) == 6


def test_lm_head_may_be_absent_from_the_patterns_and_the_model(
    make_model: Callable[[str], Artifact],
) -> None:
    model = skeleton(make_model("llama"))
    assert len(find_targets(model, ())) == 3
    assert not any("lm_head" in t.name for b in find_targets(model, ()) for t in b.targets)


@pytest.mark.parametrize(("pattern", "hint"), [("*.dwn_proj", "down_proj"), ("lm_haed", "lm_head")])
def test_a_pattern_that_names_nothing_is_answered_with_the_nearest(
    make_model: Callable[[str], Artifact], pattern: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        find_targets(skeleton(make_model("llama")), (pattern,))
    assert pattern in caught.value.message and hint in str(caught.value.hint)


def test_ignoring_everything_is_refused(make_model: Callable[[str], Artifact]) -> None:
    with pytest.raises(UsageError, match="no linear layer"):
        find_targets(skeleton(make_model("llama")), ("model.layers.*",))


def bare(config: Any) -> PreTrainedModel:
    """A model without weights, as `skeleton` makes it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linearize(model)
    unfuse(model)
    return cast(PreTrainedModel, model)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def test_a_conv1d_is_a_target_with_its_sides_the_right_way_round(
    make_model: Callable[[str], Artifact],
) -> None:
    found = find_targets(skeleton(make_model("gpt2")), ())
    assert found[0].targets == (
        Target("transformer.h.0.attn.c_attn", 96, 32),
        Target("transformer.h.0.attn.c_proj", 32, 32),
        Target("transformer.h.0.mlp.c_fc", 128, 32),
        Target("transformer.h.0.mlp.c_proj", 32, 128),
    )


def test_every_expert_is_a_target_and_no_router() -> None:
    model = bare(MixtralConfig(**SIZES, num_local_experts=8))
    found = find_targets(model, ())
    names = [target.name for target in found[0].targets]
    assert len(names) == 4 + 8 * 3
    assert Target("model.layers.0.mlp.experts.7.down_proj", 32, 64) in found[0].targets
    assert find_routers(model) == {
        f"model.layers.{i}.mlp.gate": "it chooses among the 8 experts of its layer"
        for i in range(2)
    }


def test_routers_are_known_by_their_outputs_be_they_linear_layers_or_not() -> None:
    model = bare(Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=48))
    mixture = model.get_submodule("model.layers.1.mlp")
    mixture.gate = torch.nn.Linear(32, 8)
    routers = find_routers(model)
    assert list(routers) == [
        f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate", "shared_expert_gate")
    ]
    assert routers["model.layers.0.mlp.shared_expert_gate"].startswith("it weighs")
    names = {target.name for target in find_targets(model, ())[1].targets}
    assert "model.layers.1.mlp.shared_expert.down_proj" in names and not names & set(routers)


def test_a_layer_is_no_router_for_its_inputs_within_an_expert_or_without_experts() -> None:
    narrow = bare(Qwen3MoeConfig(**(SIZES | {"hidden_size": 8}), **MOE, head_dim=8))
    names = {target.name for target in find_targets(narrow, ())[0].targets}
    layers = [f"mlp.experts.{i}.{leaf}_proj" for i in range(8) for leaf in ("gate", "up", "down")]
    layers += [f"self_attn.{leaf}_proj" for leaf in "qkv"]
    assert names == {f"model.layers.0.{layer}" for layer in layers}, "8 inputs, or 8 outputs within"
    dense = bare(Qwen3Config(**SIZES, head_dim=8))
    dense.get_submodule("model.layers.0.mlp").extra = torch.nn.Linear(32, 1)
    assert find_routers(dense) == {}


def test_a_router_may_be_named_in_ignore() -> None:
    model = bare(MixtralConfig(**SIZES, num_local_experts=8))
    assert find_targets(model, ("*.mlp.gate",)) == find_targets(model, ())


def test_modules_of_another_kind_are_refused_and_can_be_left_out() -> None:
    model = bare(JetMoeConfig(**{k: v for k, v in SIZES.items() if "heads" not in k}))
    with pytest.raises(UnsupportedError, match=r"experts?.*|weight") as caught:
        find_targets(model, ())
    assert "model.layers.0" in caught.value.message
    patterns = re.findall(r"--ignore '([^']+)'", str(caught.value.hint))
    found = find_targets(model, tuple(patterns))
    assert found[0].targets


def test_what_experts_do_alike_is_one_stage() -> None:
    model = bare(MixtralConfig(**SIZES, num_local_experts=3))
    block = "model.layers.0"
    qkv = tuple(f"{block}.self_attn.{leaf}_proj" for leaf in "qkv")
    output = (f"{block}.self_attn.o_proj",)
    experts = [f"{block}.mlp.experts.{i}" for i in range(3)]
    routed = [
        group
        for expert in experts
        for group in ((f"{expert}.gate_proj", f"{expert}.up_proj"), (f"{expert}.down_proj",))
    ]
    assert stages(model, [qkv, output, *routed]) == [[qkv], [output], routed[::2], routed[1::2]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [((256, 512), 128), ((576, 1536), 64), ((96, 128), 32), ((48, 128), None)],
)
def test_auto_takes_the_largest_that_divides_every_layer(
    columns: tuple[int, ...], expected: int | None
) -> None:
    assert choose_group_size("auto", targets_of(*columns)) == expected


def test_a_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UsageError) as caught:
        choose_group_size(128, targets_of(1536, 576))
    assert "128 does not divide the 576 input columns of layer1" in caught.value.message
    assert caught.value.hint == "these fit every layer: 64, 32, channel"


def test_channel_is_the_whole_row() -> None:
    assert choose_group_size("channel", targets_of(100)) is None
    assert choose_group_size(64, targets_of(128, 64)) == 64

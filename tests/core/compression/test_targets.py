from collections.abc import Callable

import pytest

from infopt.core.artifact.read import Artifact
from infopt.core.compression.targets import (
    Target,
    choose_group_size,
    find_targets,
    require_multiple,
)
from infopt.core.errors import UnsupportedError, UsageError
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


def test_blocks_of_other_modules_are_refused_by_name(
    make_model: Callable[[str], Artifact],
) -> None:
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D"):
        find_targets(skeleton(make_model("gpt2")), ())


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


def test_sides_that_the_format_cannot_hold_are_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        require_multiple([*targets_of(64), Target("a.odd", 50, 64)], 32, "the gptq format")
    assert "a.odd" in caught.value.message and "50x64" in caught.value.message
    assert "a.odd" in str(caught.value.hint)

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from infopt.core.artifact.read import Artifact
from infopt.core.compression.targets import find_targets
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError
from infopt.core.models.hf import load_transformers

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "phi3", "gemma3", "opt", "bloom", "gpt2"]


def tokens(rows: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def make_walk(artifact: Artifact, keep_bytes: int = 0) -> Walk:
    data = tokens()
    # Batches of unequal sizes: each must get the masks of its own size.
    walk = Walk(
        artifact,
        data[:1, :8],
        (data[:2], data[2:4], data[4:]),
        torch.float32,
        CPU,
        keep_bytes=keep_bytes,
    )
    walk.start()
    return walk


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_computes_what_the_whole_model_does(
    make_model: Callable[[str], Artifact], family: str
) -> None:
    artifact = make_model(family)
    walk = make_walk(artifact)
    assert all(p.is_meta for p in walk.model.parameters()), "nothing stays in memory"
    for _ in walk.names:
        walk.load()
        walk.advance()
        assert all(p.is_meta for p in walk.model.parameters())
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens()[:1, :8]).logits
    assert float((walk.probe_logits() - expected).abs().max()) < 1e-4
    # The hidden states of every batch too, through the whole model's hooks.
    for batch, hidden in zip(
        (tokens()[:2], tokens()[4:]), (walk.hidden[1], walk.hidden[3]), strict=True
    ):
        assert float((last_block_output(model, walk.names[-1], batch) - hidden).abs().max()) < 1e-4


def last_block_output(model: torch.nn.Module, name: str, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def hook(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with model.get_submodule(name).register_forward_hook(hook), torch.no_grad():
        model(batch)
    return seen[0]


def test_groups_are_those_that_share_an_input(make_model: Callable[[str], Artifact]) -> None:
    walk = make_walk(make_model("llama"))
    targets = find_targets(walk.model, ("lm_head",))[0].targets
    walk.load()
    leaves = [tuple(n.rpartition(".")[2] for n in group) for group in walk.input_groups(targets)]
    assert leaves == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


def test_observed_inputs_are_those_of_the_whole_model(
    make_model: Callable[[str], Artifact],
) -> None:
    artifact = make_model("gemma3")
    walk = make_walk(artifact)
    walk.load()
    walk.advance()
    walk.load()
    name = f"{walk.names[1]}.mlp.down_proj"
    seen = [found[name] for found in walk.inputs([name])]
    assert len(seen) == 3, "the probe is left out"

    model = load_transformers(artifact, torch.float32, CPU)
    expected: list[Tensor] = []
    layer = model.get_submodule(name)
    with layer.register_forward_pre_hook(lambda _, args: expected.append(args[0])), torch.no_grad():
        for batch in (tokens()[:2], tokens()[2:4], tokens()[4:]):
            model(batch)
    for one, other in zip(seen, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-4


def test_observing_computes_no_further_than_it_must(make_model: Callable[[str], Artifact]) -> None:
    walk = make_walk(make_model("llama"))
    walk.load()
    later: list[str] = []
    module = walk.layer(f"{walk.names[0]}.self_attn.o_proj")
    module.register_forward_pre_hook(lambda *_: later.append("o_proj"))
    list(walk.inputs([f"{walk.names[0]}.self_attn.q_proj"]))
    assert later == []


def test_later_blocks_see_changed_weights(make_model: Callable[[str], Artifact]) -> None:
    artifact = make_model("llama")
    plain, changed = make_walk(artifact), make_walk(artifact)
    for walk in (plain, changed):
        walk.load()
    with torch.no_grad():
        changed.layer(f"{changed.names[0]}.mlp.down_proj").weight.zero_()
    for walk in (plain, changed):
        walk.advance()
    assert not torch.equal(plain.hidden[1], changed.hidden[1])


def test_a_walk_is_taken_up_where_it_was_left(make_model: Callable[[str], Artifact]) -> None:
    artifact = make_model("gemma3")
    first = make_walk(artifact)
    for _ in range(2):
        first.load()
        first.advance()
    second = make_walk(artifact)
    second.skip_to(2, first.hidden)
    for walk in (first, second):
        walk.load()
        walk.advance()
    assert torch.equal(first.probe_logits(), second.probe_logits())


def test_activations_that_overflow_are_named(make_model: Callable[[str], Artifact]) -> None:
    walk = make_walk(make_model("llama"))
    walk.load()
    with torch.no_grad():
        walk.layer(f"{walk.names[0]}.mlp.down_proj").weight.fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"model\.layers\.0"):
        walk.advance()


@pytest.mark.parametrize("keep_bytes", [0, 3000, 10**9])
def test_settled_layers_give_the_same_outputs(
    make_model: Callable[[str], Artifact], keep_bytes: int
) -> None:
    """However much is kept, even nothing or a part."""
    artifact = make_model("gemma3")
    plain, settled = make_walk(artifact), make_walk(artifact, keep_bytes)
    for _ in plain.names:
        plain.load()
        plain.advance()
        settled.load()
        name = settled.names[settled.position]
        settled.settle([f"{name}.self_attn.{leaf}_proj" for leaf in "qkv"])
        list(settled.inputs([f"{name}.mlp.down_proj"]))
        settled.settle([f"{name}.mlp.gate_proj"])
        settled.advance()
        for one, other in zip(plain.hidden, settled.hidden, strict=True):
            assert torch.equal(one, other)


def test_kept_outputs_spare_the_work_unless_the_model_writes_into_them(
    make_model: Callable[[str], Artifact],
) -> None:
    walk = make_walk(make_model("llama"), keep_bytes=10**9)
    walk.load()
    prefix = f"{walk.names[0]}.self_attn"
    computed: list[str] = []
    for leaf in ("q_proj", "k_proj"):
        layer = walk.layer(f"{prefix}.{leaf}")
        plain = layer.forward

        def counted(inputs: Tensor, leaf: str = leaf, plain: object = plain) -> Tensor:
            computed.append(leaf)
            assert callable(plain)
            found: Tensor = plain(inputs)
            return found

        layer.forward = counted  # type: ignore[method-assign]
    walk.layer(f"{prefix}.k_proj").register_forward_hook(lambda _, __, output: output.mul_(1.5))
    walk.settle([f"{prefix}.q_proj", f"{prefix}.k_proj"])
    for _ in range(2):
        list(walk.inputs([f"{prefix}.o_proj"]))
    assert computed.count("q_proj") == 3 and computed.count("k_proj") == 6


def test_a_module_whose_every_target_is_settled_runs_once_a_batch(
    make_model: Callable[[str], Artifact],
) -> None:
    walk = make_walk(make_model("llama"), keep_bytes=10**9)
    walk.load()
    block = walk.names[0]
    walk.input_groups(find_targets(walk.model, ("lm_head",))[0].targets)
    entered: list[object] = []
    walk.layer(f"{block}.self_attn.q_proj").register_forward_pre_hook(lambda *_: entered.append(1))
    walk.settle([f"{block}.self_attn.{leaf}_proj" for leaf in "qkv"])
    list(walk.inputs([f"{block}.self_attn.o_proj"]))
    walk.settle([f"{block}.self_attn.o_proj"])
    list(walk.inputs([f"{block}.mlp.up_proj"]))
    assert len(entered) == 3, "o_proj's input was held: nothing before it runs again"
    list(walk.inputs([f"{block}.mlp.down_proj"]))
    walk.advance()
    assert len(entered) == 4, "for the probe, which nothing has computed before"


def test_a_tail_held_before_its_module_was_settled_is_not_used(
    make_model: Callable[[str], Artifact],
) -> None:
    """o_proj's input, seen while q_proj had other weights, is no input of the settled module."""
    artifact = make_model("llama")
    plain, settled = make_walk(artifact), make_walk(artifact, keep_bytes=10**9)
    for walk in (plain, settled):
        walk.load()
        block = walk.names[0]
        walk.input_groups(find_targets(walk.model, ("lm_head",))[0].targets)
        names = [f"{block}.self_attn.{leaf}_proj" for leaf in "qkvo"]
        for _ in walk.inputs(names):
            pass
        walk.layer(names[0]).weight.mul_(0.5)
        if walk is settled:
            walk.settle(names)
        walk.advance()
    for one, other in zip(plain.hidden, settled.hidden, strict=True):
        assert torch.equal(one, other)

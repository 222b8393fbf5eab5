"""Students cut out of their teachers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from infopt.core.artifact.read import Artifact
from infopt.core.distillation.student import cut_student, evenly, plan_student, write_student
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.recipe.distill import StudentShape, shape_of

MakeLlama = Callable[..., Artifact]


def shape(word: str) -> StudentShape:
    found = shape_of(word)
    assert found is not None
    return found


def test_layers_are_taken_evenly_with_both_ends() -> None:
    assert evenly(12, 6) == (0, 2, 4, 7, 9, 11)
    assert evenly(30, 7) == (0, 5, 10, 14, 19, 24, 29)
    assert evenly(5, 5) == (0, 1, 2, 3, 4) and evenly(5, 1) == (0,) and evenly(5, 2) == (0, 4)
    for total in range(1, 20):
        for count in range(1, total + 1):
            found = evenly(total, count)
            assert len(set(found)) == count and list(found) == sorted(found)


@pytest.mark.parametrize(
    ("word", "sizes"),
    [
        ("layers=2", {"num_hidden_layers": 2}),
        ("layers=0.5x,ffn=0.5x", {"num_hidden_layers": 2, "intermediate_size": 64}),
        ("heads=2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("hidden=0.5x,ffn=96", {"hidden_size": 32, "intermediate_size": 96}),
        ("heads=0.5x,hidden=0.5x", {"num_attention_heads": 2, "hidden_size": 32}),
    ],
)
def test_a_student_is_a_plain_smaller_model(
    make_llama: MakeLlama, tmp_path: Path, word: str, sizes: dict[str, int]
) -> None:
    teacher = make_llama(num_hidden_layers=4)
    cut = cut_student(teacher, shape(word))
    assert plan_student(teacher, shape(word)).shrunk.parameters == cut.shrunk.parameters
    written = write_student(tmp_path / "s", teacher, cut, random=False, seed=0)
    assert written.summary().parameters == cut.shrunk.parameters
    assert {key: written.config[key] for key in sizes} == sizes
    model = AutoModelForCausalLM.from_pretrained(written.path)
    assert torch.isfinite(model(torch.ones(1, 5, dtype=torch.int64)).logits).all()
    for place, layer in enumerate(cut.layers):
        if shape(word) == StudentShape(layers=2):
            name = "mlp.up_proj.weight"
            ours = written.tensor(f"model.layers.{place}.{name}")
            assert torch.equal(ours, teacher.tensor(f"model.layers.{layer}.{name}"))


def test_random_weights_are_those_of_the_seed(make_llama: MakeLlama, tmp_path: Path) -> None:
    teacher = make_llama(num_hidden_layers=4)
    cut = cut_student(teacher, shape("layers=2"))
    made = {
        name: write_student(tmp_path / name, teacher, cut, random=True, seed=seed)
        for name, seed in (("one", 1), ("same", 1), ("two", 2))
    }
    files = {name: (made[name].path / "model.safetensors").read_bytes() for name in made}
    assert files["one"] == files["same"] != files["two"]
    plain = write_student(tmp_path / "plain", teacher, cut, random=False, seed=1)
    assert plain.names() == made["one"].names()
    for name in plain.names():
        assert plain.shape(name) == made["one"].shape(name)
        assert plain.dtype(name) == made["one"].dtype(name)


def test_sizes_that_the_teacher_has_not_are_refused(make_llama: MakeLlama) -> None:
    teacher = make_llama()
    for word, said in (
        ("layers=3", "2 layers, not 3"),
        ("heads=3", "does not divide"),
        ("heads=6", "4 heads, not 6"),
        ("ffn=200", "128 ffn, not 200"),
        ("hidden=65", "64 hidden, not 65"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_student(teacher, shape(word))


def test_sizes_that_transformers_does_not_take_are_refused(make_llama: MakeLlama) -> None:
    teacher = make_llama(num_key_value_heads=4)
    with pytest.raises(UnsupportedError, match=r"tiny cannot have this shape: .*multiple"):
        plan_student(teacher, shape("heads=3"))

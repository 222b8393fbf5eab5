"""The door, from end to end on tiny models."""

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.compression.quality import held_out
from infopt.core.distillation.acceptance import judge, look_at
from infopt.core.distillation.distill import distill
from infopt.core.distillation.plan import plan_distill
from infopt.core.errors import NumericsError, ResumeError, UsageError
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.recipe.distill import DistillSettings
from infopt.core.recipe.recipe import load_recipe
from infopt.core.reports.distill import DistillReport

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]


def settings(text: Path, **changes: Any) -> DistillSettings:
    values: dict[str, Any] = {
        "student": "layers=1",
        "steps": 6,
        "learning_rate": 2e-3,
        "batch_tokens": 128,
        "micro_tokens": 64,
        "sequence_length": 32,
        "save_every": 2,
        "text": str(text),
        "dtype": "float32",
        "precision": "float32",
        "device": "cpu",
    }
    return DistillSettings.model_validate(values | changes)


def run(artifact: Artifact, output: Path, wanted: DistillSettings, **how: Any) -> DistillReport:
    report = distill(artifact, output, wanted, **how)
    assert isinstance(report, DistillReport)
    return report


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_a_student_learns_and_is_a_plain_model(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher = make_llama(num_hidden_layers=3, lively=True, initializer_range=0.1)
    wanted = settings(calibration_file, steps=30, learning_rate=1e-3)
    report = run(teacher, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    verify_manifest(written.path)
    assert written.config["num_hidden_layers"] == 1 and report.student_layers == (0,)
    assert report.parameters.student == written.summary().parameters < report.parameters.teacher
    assert report.parameters.share == report.parameters.student / report.parameters.teacher
    assert report.steps == 30 and report.tokens == 30 * 4 * 31 and report.resumed_steps == 0
    assert report.logits_max_difference == 0.0 and report.stopped is None
    assert len(report.losses) == 30 and report.held_out[0].step == 0
    first, last = (report.losses[n].parts["loss"] for n in (0, -1))
    assert last < 0.5 * first, "it comes closer to its teacher"
    assert set(report.losses[0].parts) == {"loss", "divergence", "gradient"}
    for key in ("teacher", "before", "after"):
        assert getattr(report.perplexity, key) == pytest.approx(math.exp(getattr(report.nll, key)))
    accepted = report.acceptance
    assert accepted.after.text > 2 * accepted.before.text > 0
    assert accepted.greedy_tokens == 16 * 64 and accepted.text_tokens == 8192 - 64
    model = load_transformers(teacher, torch.float32, CPU)
    nll, draft = judge(
        load_transformers(written, torch.float32, CPU), look_at(model, held_out(teacher))
    )
    assert (nll, draft) == (report.nll.after, accepted.after)
    AutoModelForCausalLM.from_pretrained(written.path)
    assert load_recipe(written.path / "recipe.yaml").steps[0].settings == wanted
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"


def stop_at(step: int, fault: type[BaseException]) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.stage == "training" and progress.done == step:
            raise fault

    return callback


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"alpha": 0.5, "loss": "jsd", "temperature": 2.0},
    "cross-entropy": {"alpha": 0.0},
    "cached": {"top_k": 8, "student": "ffn=0.5x"},
    "on-policy": {"on_policy": 0.5, "loss": "reverse-kl"},
    "sequence": {"sequence_level": True},
    "matched": {"hidden_weight": 1.0, "attention_weight": 1.0, "student": "hidden=0.5x"},
    "random": {"student_init": "random", "patience": 3, "evaluate_every": 1},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError], ids=["ctrl-c", "crash"])
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    way: str,
    fault: type[BaseException],
) -> None:
    teacher, wanted = make_llama(), settings(calibration_file, **WAYS[way])
    whole = run(teacher, tmp_path / "whole", wanted)
    with pytest.raises(fault):
        distill(teacher, tmp_path / "out", wanted, progress=stop_at(3, fault))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResumeError, match="unfinished"):
        distill(teacher, tmp_path / "out", wanted)
    report = run(teacher, tmp_path / "out", wanted, resume=True)
    assert report.resumed_steps == (3 if fault is KeyboardInterrupt else 2)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    same = {"seconds", "output", "student", "resumed_steps", "peak_memory_bytes"}
    assert report.model_dump(exclude=same) == whole.model_dump(exclude=same)


def test_interrupted_preparations_go_on(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "keeping logits" and progress.done == 40:
            raise KeyboardInterrupt

    teacher = make_llama()
    wanted = settings(calibration_file, top_k=4, sequence_level=True, steps=15)
    run(teacher, tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, tmp_path / "out", wanted, progress=stop)
    seen: list[Progress] = []
    run(teacher, tmp_path / "out", wanted, resume=True, progress=seen.append)
    assert not [p for p in seen if p.stage == "teacher writing"], "that was done"
    assert {p.resumed for p in seen if p.stage == "keeping logits"} == {32}
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_other_work_is_not_gone_on_with(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher, wanted = make_llama(), settings(calibration_file)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, tmp_path / "out", wanted, progress=stop_at(3, KeyboardInterrupt))
    other = settings(calibration_file, temperature=2.0)
    with pytest.raises(ResumeError, match="setting temperature"):
        distill(teacher, tmp_path / "out", other, resume=True)
    report = run(teacher, tmp_path / "out", other, replace=True)
    assert report.resumed_steps == 0 and report.loss == "forward-kl at T=2"


def test_a_student_of_its_own_learns_from_another_model(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher = make_llama("teacher", num_hidden_layers=3)
    student = make_llama("student", hidden_size=32, head_dim=16, tie_word_embeddings=False)
    wanted = settings(calibration_file, student="student", steps=10)
    report = run(teacher, tmp_path / "out", wanted, student=student)
    assert report.student_layers is None and report.nll.after < report.nll.before
    written = read_artifact(tmp_path / "out")
    assert written.names() == student.names() and written.config == student.config
    assert report.model == report.teacher and report.teacher.name == "teacher"


def test_what_was_pruned_of_a_student_stays_zero(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher = make_llama("teacher", num_hidden_layers=3)
    student = make_llama("student")
    tensors = load_file(student.path / "model.safetensors")
    pruned = [name for name in tensors if "layers.1.mlp" in name]
    for name in pruned:
        tensors[name][:, ::2] = 0
    save_file(tensors, student.path / "model.safetensors", {"format": "pt"})
    student = read_artifact(student.path)
    wanted = settings(calibration_file, student="student", steps=4)
    report = run(teacher, tmp_path / "out", wanted, student=student)
    assert report.nll.after < report.nll.before
    written = read_artifact(tmp_path / "out")
    assert len(pruned) == 3
    for name in pruned:
        assert not written.tensor(name)[:, ::2].any()
        assert not torch.equal(written.tensor(name), tensors[name]), "what is left learned"
    dense = "model.layers.0.mlp.up_proj.weight"
    assert written.tensor(dense).all()


def test_what_does_not_fit_is_refused_before_any_work(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher, out = make_llama(), tmp_path / "out"
    wide = make_llama("wide", vocab_size=300)
    with pytest.raises(UsageError, match="300 tokens"):
        distill(teacher, out, settings(calibration_file, student="wide"), student=wide)
    with pytest.raises(UsageError, match="128 positions"):
        wanted = settings(calibration_file, sequence_length=256, batch_tokens=256)
        distill(teacher, out, wanted)
    with pytest.raises(UsageError, match="the student is missing"):
        distill(teacher, out, settings(calibration_file, student="a-model"))
    with pytest.raises(UsageError, match="knows 256 tokens, not the 257 of top_k"):
        distill(teacher, out, settings(calibration_file, top_k=257))
    with pytest.raises(UsageError, match="2 layers, not 5"):
        distill(teacher, out, settings(calibration_file, student="layers=5"))
    with pytest.raises(UsageError, match="the model that is read"):
        distill(teacher, teacher.path, settings(calibration_file), replace=True)
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        distill(teacher, out, settings(calibration_file))
    assert not list(tmp_path.glob(".*"))


def test_weights_that_are_not_finite_leave_nothing_behind(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    teacher = make_llama()
    file = teacher.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="not finite"):
        distill(read_artifact(teacher.path), tmp_path / "out", settings(calibration_file))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_learning_rate_that_blows_up_is_told(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    wanted = settings(calibration_file, learning_rate=1e30, clip=1e30)
    with pytest.raises(NumericsError, match="not finite"):
        distill(make_llama(), tmp_path / "out", wanted)
    assert not list(tmp_path.glob(".out*"))


def test_the_plan_says_what_would_be_done(make_llama: MakeLlama, calibration_file: Path) -> None:
    teacher = make_llama()
    plain = plan_distill(teacher, settings(calibration_file))
    assert plan_distill(teacher, settings(calibration_file, top_k=8)).disk_bytes > plain.disk_bytes
    assert "forward-kl at T=1" in plain.actions[0] and plain.seconds is not None
    on_policy = plan_distill(teacher, settings(calibration_file, on_policy=0.5))
    assert on_policy.seconds is None and "50% of windows" in " ".join(on_policy.actions)


PROCESS = """
import sys
from pathlib import Path
from infopt.core.artifact.read import read_artifact
from infopt.core.distillation.distill import distill, follow
from infopt.core.recipe.distill import DistillSettings
from infopt.core.training.devices import rank
source, out, words = sys.argv[1:]
settings = DistillSettings.model_validate_json(words)
teacher = read_artifact(Path(source))
if rank() == 0:
    distill(teacher, Path(out), settings)
else:
    follow(teacher, Path(out), settings)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "cached"])
def test_two_processes_teach_as_one(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, way: str
) -> None:
    teacher = make_llama()
    wanted = settings(calibration_file, **WAYS[way])
    run(teacher, tmp_path / "one", wanted)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, str(teacher.path), str(tmp_path / "two")]
    command.append(wanted.model_dump_json())
    both = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=2e-2), name
    assert not list(tmp_path.glob(".two*"))

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.errors import (
    InfoptError,
    NumericsError,
    ResumeError,
    UnsupportedError,
    UsageError,
)
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import load_recipe
from infopt.core.reports.quantize import LayerError, QuantizeReport

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]


def rounded(weight: Tensor, number_format: IntegerFormat, *, mse: bool = True) -> QuantizedWeight:
    return quantize_nearest(weight, number_format, group_grids(weight, number_format, mse=mse))


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu", "group_size": 32}
    return QuantizeSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_artifact_is_what_was_computed(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    method: str,
    bits: int,
    symmetric: bool,
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, method=method, bits=bits, symmetric=symmetric)
    report = quantize(source, tmp_path / "out", wanted)
    assert report.logits_max_difference == 0.0
    unread = "not read, for nothing here sees the calibration text: text, samples, sequence_length"
    assert report.warnings == ((unread,) if method == "rtn" else ())
    assert len(report.layers) == 14
    assert report.group_size == 32 and report.resumed_blocks == 0
    assert report.calibration_tokens == (16 * 32 if method == "gptq" else 0)
    written = read_artifact(tmp_path / "out")
    verify_manifest(written.path)
    assert report.bytes == written.weight_bytes < source.weight_bytes
    dense = [name for name in source.names() if "_proj" not in name]
    for name in dense:
        assert torch.equal(written.tensor(name), source.tensor(name))
        assert written.dtype(name) == source.dtype(name)
    for row in report.layers:
        weight = linear_weight(written, row.name)
        assert isinstance(weight, QuantizedWeight)
        number_format = IntegerFormat(bits, symmetric, 32)
        assert weight.format == number_format
        original = source.tensor(f"{row.name}.weight")
        if method == "rtn":
            nearest = rounded(original, number_format)
            assert torch.equal(weight.codes, nearest.codes)
            assert row.error == row.rtn_error
        else:
            assert row.damp == 0.01 and row.fallback is None
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"


def test_gptq_is_better_than_rounding_nearly_everywhere(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    report = quantize(make_llama(), tmp_path / "out", settings(calibration_file))
    better = [row.error <= row.rtn_error for row in report.layers]
    assert sum(better) >= len(better) - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": "channel"},
        {"group_size": "auto"},
        {"act_order": False},
        {"grid": "minmax"},
        {"true_sequential": False},
        {"act_order": False, "group_size": "channel", "symmetric": False},
    ],
    ids=str,
)
def test_every_option_does_something(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_llama()
    quantize(source, tmp_path / "plain", settings(calibration_file))
    report = quantize(source, tmp_path / "out", settings(calibration_file, **changes))
    assert report.logits_max_difference == 0.0
    plain, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    codes = [name for name in plain if name.endswith("qweight")]
    assert any(not torch.equal(plain[name], other[name]) for name in codes)
    assert report.group_size == {"channel": None, "auto": 64}.get(
        str(changes.get("group_size", 32)), 32
    )


def test_configs_and_recipe_say_what_was_done(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    wanted = settings(calibration_file, bits=3, group_size="channel")
    quantize(make_llama(), tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    table = written.config["quantization_config"]
    assert table["quant_method"] == "gptq" and table["checkpoint_format"] == "gptq"
    assert (table["bits"], table["group_size"], table["sym"]) == (3, -1, True)
    assert table["desc_act"] is False and table["lm_head"] is False
    assert table["meta"]["quantizer"][0].startswith("infopt:")
    own = {key: value for key, value in written.config.items() if key != "quantization_config"}
    assert own == make_llama("again").config
    step = load_recipe(tmp_path / "out" / "recipe.yaml").steps[0]
    assert step.settings == wanted
    assert written.summary().parameters == make_llama("once more").summary().parameters


def test_ignored_layers_stay_as_they_are(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    report = quantize(
        source, tmp_path / "out", settings(calibration_file, ignore=("lm_head", "*.layers.0.*"))
    )
    assert {row.name.split(".")[2] for row in report.layers} == {"1"}
    written = read_artifact(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written.tensor(name), source.tensor(name))
    table = written.config["quantization_config"]
    assert len(table["dynamic"]) == 7
    assert "-:^model\\.layers\\.0\\.mlp\\.up_proj$" in table["dynamic"]
    assert len(table["modules_in_block_to_quantize"][0]) == 7
    load_transformers(written, torch.float32, CPU)


def test_progress_tells_of_every_layer(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    quantize(make_llama(), tmp_path / "out", settings(calibration_file), progress=seen.append)
    layers = [p for p in seen if p.stage == "quantizing layers"]
    assert (layers[0].done, layers[-1].done, layers[-1].total) == (0, 14, 14)
    assert [p.done for p in layers] == sorted(p.done for p in layers)


def stop_in_block(number: int) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.note.startswith(f"block {number} ") and progress.done % 7 == 3:
            raise KeyboardInterrupt

    return callback


def timeless(report: QuantizeReport) -> list[LayerError]:
    """The layers, less how long they took."""
    return [layer.model_copy(update={"seconds": 0.0}) for layer in report.layers]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_interrupted_run_continues_to_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, method: str
) -> None:
    source = make_llama(num_hidden_layers=3)
    wanted = settings(calibration_file, method=method)
    whole = quantize(source, tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", wanted, progress=stop_in_block(3))
    assert not (tmp_path / "out").exists()
    seen: list[Progress] = []
    report = quantize(source, tmp_path / "out", wanted, resume=True, progress=seen.append)
    assert report.resumed_blocks == 2
    assert {p.resumed for p in seen if p.stage == "quantizing layers"} == {14}
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert timeless(report) == timeless(whole)
    assert not list(tmp_path.glob(".out*"))


def test_unfinished_work_is_never_mixed_with_other_work(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, wanted = make_llama(), settings(calibration_file)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, wanted, progress=stop_in_block(2))
    with pytest.raises(ResumeError) as caught:
        quantize(source, out, wanted)
    assert "--resume" in str(caught.value.hint) and "--yes" in str(caught.value.hint)
    others = {
        "setting scheme": (source, settings(calibration_file, bits=8)),
        "setting damp_percent": (source, settings(calibration_file, damp_percent=0.02)),
        "calibration tokens": (source, settings(calibration_file, seed=1)),
        "model": (make_llama("other", rms_norm_eps=0.1), wanted),
    }
    for named, (model, changed) in others.items():
        with pytest.raises(ResumeError, match=named):
            quantize(model, out, changed, resume=True)
    partial = next(tmp_path.glob(".out*"))
    hidden = next(partial.glob("hidden-*"))
    hidden.write_bytes(hidden.read_bytes()[:-1] + b"x")
    with pytest.raises(ResumeError, match="damaged"):
        quantize(source, out, wanted, resume=True)
    report = quantize(source, out, settings(calibration_file, bits=8), replace=True)
    assert report.bits == 8 and report.resumed_blocks == 0


def test_resume_with_nothing_to_resume_begins(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    report = quantize(make_llama(), tmp_path / "out", settings(calibration_file), resume=True)
    assert report.resumed_blocks == 0


def test_an_existing_output_is_kept_unless_replaced(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, wanted = make_llama(), settings(calibration_file, method="rtn")
    quantize(source, tmp_path / "out", wanted)
    before = content(tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        quantize(source, tmp_path / "out", wanted)
    assert content(tmp_path / "out") == before
    quantize(
        source, tmp_path / "out", settings(calibration_file, method="rtn", bits=8), replace=True
    )
    assert read_artifact(tmp_path / "out").config["quantization_config"]["bits"] == 8


def broken(source: Artifact, name: str, value: float) -> Artifact:
    file = source.path / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return read_artifact(source.path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, value: float, method: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = broken(make_llama(), name, value)
    with pytest.raises(NumericsError, match=name):
        quantize(source, tmp_path / "out", settings(calibration_file, method=method))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_weights_that_no_scale_reaches_are_named_and_nothing_is_written(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = broken(make_llama(), "model.layers.0.mlp.down_proj.weight", 3e38)
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.down_proj: .*too large"):
        quantize(source, tmp_path / "out", settings(calibration_file))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_quantized_model_is_not_quantized_again(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    quantize(make_llama(), tmp_path / "out", settings(calibration_file, method="rtn"))
    with pytest.raises(UnsupportedError, match="already"):
        quantize(read_artifact(tmp_path / "out"), tmp_path / "again", settings(calibration_file))


def test_sizes_that_do_not_fit_are_refused_at_once(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="128 does not divide the 64"):
        quantize(make_llama(), tmp_path / "out", settings(calibration_file, group_size=128))
    odd = make_llama("odd", intermediate_size=80)
    with pytest.raises(UnsupportedError, match="divisible by 32") as caught:
        quantize(odd, tmp_path / "out", settings(calibration_file, group_size="channel"))
    name = "model.layers.0.mlp.gate_proj"
    assert name in caught.value.message and "80 x 64" in caught.value.message
    assert name in str(caught.value.hint)


RUN = """
import sys
from pathlib import Path
from infopt.core.artifact.read import read_artifact
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
source, out, text, resume = sys.argv[1:]
settings = QuantizeSettings(
    calibration={"text": text, "samples": 64, "sequence_length": 64},
    dtype="float32", device="cpu", group_size=32,
)
quantize(read_artifact(Path(source)), Path(out), settings, resume=resume == "resume",
         progress=lambda p: sys.stdout.write(f"{p.note}\\n") and sys.stdout.flush())
"""


def start(source: Artifact, out: Path, text: Path, word: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(source.path), str(out), str(text), word]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


@pytest.mark.slow
def test_sigkill_at_any_moment_and_resume_gives_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama(num_hidden_layers=6)
    whole = start(source, tmp_path / "whole", calibration_file, "new")
    whole.communicate()
    assert whole.returncode == 0
    out = tmp_path / "out"
    for attempt, block in enumerate((2, 4, 5)):
        process = start(source, out, calibration_file, "resume" if attempt else "new")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"block {block} "):
                break
        time.sleep(0.02 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
    last = start(source, out, calibration_file, "resume")
    last.communicate()
    assert last.returncode == 0
    assert content(out) == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_two_processes_on_one_output_are_kept_apart(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama(num_hidden_layers=6)
    process = start(source, tmp_path / "out", calibration_file, "new")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("block 2 "):
            process.send_signal(signal.SIGSTOP)
            break
    try:
        for how in ({}, {"resume": True}, {"replace": True}):
            with pytest.raises(InfoptError, match="another infopt"):
                quantize(source, tmp_path / "out", settings(calibration_file), **how)
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert process.returncode == 0

"""`infopt bench kernels` as scripts meet it."""

import json

import pytest

from infopt.cli.main import run_app
from infopt.kernels.cpu.native import NativeError, load


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        load()
    except NativeError as error:
        pytest.skip(str(error))
    words = "bench kernels --rows 1 --shapes 64x64 --formats bfloat16,W8A8 --threads 1 --json -"
    assert run_app(words.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "kernels" and report["threads"] == 1
    assert [row["format"] for row in report["rows"]] == ["bfloat16", "W8A8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows 0", "no number of rows"),
        ("--shapes 64", "no shape"),
        ("--shapes 64x65", "multiple of 64"),
    ],
)
def test_what_cannot_be_measured(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", "kernels", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", "kernels", "--device", "cuda"]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_tiles_are_measured_on_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_app(["bench", "kernels", "--tune"]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().err

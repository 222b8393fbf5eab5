"""An engine with native kernels answers as one with torch's."""

from pathlib import Path

import pytest
import torch

from infopt.core.artifact.read import read_artifact
from infopt.core.errors import UnsupportedError
from infopt.core.hardware import native as module
from infopt.core.layers.native import NativeEmbedding, NativeLinear
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.environment import environment
from infopt.core.runtime.llm import LLM
from infopt.core.runtime.loaded import load_for
from infopt.core.runtime.request import SamplingParams
from infopt.kernels.cpu.native import NativeError, NoLibraryError, load

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(40, 90)), [11]]


@pytest.fixture(autouse=True)
def _built() -> None:
    try:
        load()
    except NativeError as error:
        pytest.skip(str(error))


def test_greedy_tokens_in_float32_are_torchs(tiny_model: Path) -> None:
    artifact = read_artifact(tiny_model)
    found = [
        LLM(artifact, EngineSettings(kernels=kernels, kv_blocks=64, dtype="float32")).generate(
            PROMPTS, GREEDY
        )
        for kernels in ("native", "torch")
    ]
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]


def test_a_tied_table_is_held_once(tiny_model: Path) -> None:
    artifact, cpu = read_artifact(tiny_model), torch.device("cpu")
    sizes = {}
    for kernels in ("native", "torch"):
        settings = EngineSettings(kernels=kernels)
        decoder = load_for(settings, artifact, torch.bfloat16, cpu)
        native = isinstance(decoder.head, NativeLinear)
        assert native == isinstance(decoder.embedding, NativeEmbedding) == (kernels == "native")
        sizes[kernels] = decoder.resident_bytes
    assert sizes["native"] == sizes["torch"]


def test_native_kernels_that_are_demanded_and_missing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_built() -> None:
        raise NoLibraryError("the native kernels were not built")

    monkeypatch.setattr(module, "load", none_built)
    monkeypatch.delenv("INFOPT_KERNELS", raising=False)
    artifact, cpu = read_artifact(tiny_model), torch.device("cpu")
    with pytest.raises(UnsupportedError, match="were not built"):
        load_for(EngineSettings(kernels="native"), artifact, torch.float32, cpu)
    decoder = load_for(EngineSettings(), artifact, torch.float32, cpu)
    assert not isinstance(decoder.head, NativeLinear)


def test_threads_are_those_that_are_asked_for(tiny_model: Path) -> None:
    artifact, before = read_artifact(tiny_model), torch.get_num_threads()
    try:
        for threads in (2, 1):
            settings = EngineSettings(kernels="torch", threads=threads)
            load_for(settings, artifact, torch.float32, torch.device("cpu"))
            assert torch.get_num_threads() == threads == environment("cpu").threads
    finally:
        torch.set_num_threads(before)


def test_rounded_activations_need_native_kernels(tiny_model: Path) -> None:
    settings = EngineSettings(kernels="torch", activations="int8")
    with pytest.raises(UnsupportedError, match="native kernels"):
        load_for(settings, read_artifact(tiny_model), torch.float32, torch.device("cpu"))

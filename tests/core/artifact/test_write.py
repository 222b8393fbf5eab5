import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import verify_manifest, write_artifact
from infopt.core.errors import ArtifactError, NumericsError, ResourceError, UsageError


def stream(artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    return ((name, artifact.tensor(name)) for name in artifact.names())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_round_trip(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "tokenizer.json").write_text("{}")
    (artifact.path / "README.md").write_text("---\nlicense: mit\nbase_model: o/n\n---\nwords\n")
    recipe = "steps:\n- quantize: {}\n"
    made = write_artifact(
        tmp_path / "deep" / "out",
        source=artifact,
        tensors=stream(artifact),
        config={**artifact.config, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        extra={"recipe.yaml": recipe, "blob.dat": b"\x00\xff"},
    )
    assert made.name == "out" and made.names() == artifact.names()
    assert all(torch.equal(made.tensor(n), artifact.tensor(n)) for n in artifact.names())
    assert (made.path / "tokenizer.json").read_text() == "{}"
    assert (made.path / "generation_config.json").exists()
    assert (made.path / "blob.dat").read_bytes() == b"\x00\xff"
    card = (made.path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit" and head["base_model"] == "o/n"
    assert recipe.rstrip() in card and "gptq 4-bit" in card
    verify_manifest(made.path)
    listed = json.loads((made.path / "manifest.json").read_text())["files"]
    assert set(listed) == {f.name for f in made.path.iterdir()} - {"manifest.json"}
    assert [f.name for f in made.path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("shard_bytes", [1, 10_000, 2**30])
def test_same_tensors_same_bytes_in_any_sharding(
    artifact: Artifact, tmp_path: Path, shard_bytes: int
) -> None:
    made = [
        write_artifact(
            tmp_path / name,
            source=artifact,
            tensors=stream(artifact),
            config=artifact.config,
            shard_bytes=shard_bytes,
        )
        for name in ("a", "b")
    ]
    assert contents(made[0].path) == contents(made[1].path)
    assert made[0].names() == artifact.names()
    assert all(torch.equal(made[0].tensor(n), artifact.tensor(n)) for n in artifact.names())
    index = made[0].path / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 2**30)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == artifact.weight_bytes


def test_odd_sizes_and_dtypes_stay_aligned(artifact: Artifact, tmp_path: Path) -> None:
    tensors = {
        "u": torch.arange(3, dtype=torch.uint8),
        "f": torch.randn(5),
        "h": torch.randn(3).half(),
        "i": torch.arange(7, dtype=torch.int32),
        "b": torch.randn(1, 3).to(torch.bfloat16),
        "s": torch.tensor(2.5),
        "t": torch.randn(4, 6).t(),
        "e": torch.randn(2, 4).to(torch.float8_e4m3fn),
    }
    made = write_artifact(tmp_path / "o", source=artifact, tensors=iter(tensors.items()), config={})
    for name, tensor in tensors.items():
        found = made.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float())


def test_one_tensor_at_a_time(artifact: Artifact, tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(5):
            tensor = torch.zeros(4)
            tensor.mark = Counted()  # type: ignore[attr-defined]
            yield f"t{number}", tensor
            del tensor
            assert len(alive) <= 1

    write_artifact(tmp_path / "o", source=artifact, tensors=tensors(), config={})


def test_a_failure_midway_leaves_nothing(artifact: Artifact, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(3)
        raise NumericsError("NaN in b")

    before = set(tmp_path.iterdir())
    with pytest.raises(NumericsError, match="NaN in b"):
        write_artifact(tmp_path / "out", source=artifact, tensors=broken(), config={})
    with pytest.raises(ArtifactError, match="no tensors"):
        write_artifact(tmp_path / "out", source=artifact, tensors=iter(()), config={})
    assert set(tmp_path.iterdir()) == before


def test_full_disk(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, name: str, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("infopt.core.artifact.shards.ShardWriter.add", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(ResourceError, match="no space left"):
        write_artifact(tmp_path / "o", source=artifact, tensors=stream(artifact), config={})
    assert set(tmp_path.iterdir()) == before


def test_a_disk_that_lies_is_found(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import infopt.core.artifact.shards as shards

    honest = shards._copy

    def lying(spool: object, out: object, entry: object) -> None:
        honest(spool, out, entry)  # type: ignore[arg-type]
        out.seek(-1, 2)  # type: ignore[attr-defined]
        out.write(b"\x7f")  # type: ignore[attr-defined]

    monkeypatch.setattr(shards, "_copy", lying)
    with pytest.raises(ResourceError, match="read back"):
        write_artifact(tmp_path / "o", source=artifact, tensors=stream(artifact), config={})
    assert not (tmp_path / "o").exists()


def test_what_may_be_replaced(artifact: Artifact, tmp_path: Path) -> None:
    def write(path: Path, replace: bool) -> Artifact:
        return write_artifact(
            path, source=artifact, tensors=stream(artifact), config=artifact.config, replace=replace
        )

    out = tmp_path / "out"
    out.mkdir()
    write(out, False)  # an empty directory is no loss
    with pytest.raises(UsageError, match="exists already"):
        write(out, False)
    (out / "report.json").write_text("{}")
    write(out, True)
    assert not (out / "report.json").exists()

    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="was not made by infopt"):
        write(home, True)
    assert (home / "letters.txt").read_text() == "dear"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is no directory"):
        write(tmp_path / "file", True)


def test_the_source_is_never_the_output(artifact: Artifact) -> None:
    for output in (artifact.path, artifact.path.parent):
        with pytest.raises(UsageError, match="the model that is read"):
            write_artifact(
                output, source=artifact, tensors=stream(artifact), config={}, replace=True
            )
    assert (artifact.path / "config.json").exists()


def test_manifest_names_what_differs(artifact: Artifact, tmp_path: Path) -> None:
    made = write_artifact(
        tmp_path / "o", source=artifact, tensors=stream(artifact), config=artifact.config
    )
    weights = made.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs"):
        verify_manifest(made.path)
    weights.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        verify_manifest(made.path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        verify_manifest(made.path)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        verify_manifest(artifact.path)

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsafeArtifactError, UsageError


def test_tensors_shapes_dtypes_and_sizes(artifact: Artifact) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = artifact.tensor(name)
    assert artifact.shape(name) == tuple(tensor.shape) == (16, 32)
    assert artifact.dtype(name) == "float32" == str(tensor.dtype).removeprefix("torch.")
    assert artifact.has(name) and not artifact.has("nothing")
    assert artifact.names() == sorted(artifact.files)
    total = sum(artifact.tensor(n).nbytes for n in artifact.names())
    assert artifact.weight_bytes == total
    with pytest.raises(ArtifactError, match="nothing"):
        artifact.tensor("nothing")


def test_summary_counts_parameters(artifact: Artifact) -> None:
    summary = artifact.summary()
    assert summary.parameters == sum(artifact.tensor(n).numel() for n in artifact.names())
    assert summary.architecture == "LlamaForCausalLM"
    assert summary.quantization is None and summary.bytes == artifact.weight_bytes


def test_fingerprint_follows_config_and_weights(model_directory: Path) -> None:
    first = read_artifact(model_directory).fingerprint()
    assert read_artifact(model_directory).fingerprint() == first
    weights = model_directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = read_artifact(model_directory).fingerprint()
    assert second != first
    config = json.loads((model_directory / "config.json").read_text())
    (model_directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    assert read_artifact(model_directory).fingerprint() not in (first, second)


def test_sharded(model_directory: Path) -> None:
    whole = read_artifact(model_directory)
    tensors = {name: whole.tensor(name).clone() for name in whole.names()}
    (model_directory / "model.safetensors").unlink()
    names = whole.names()
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, model_directory / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (model_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    again = read_artifact(model_directory)
    assert again.names() == names
    assert all(torch.equal(again.tensor(n), tensors[n]) for n in names)

    (model_directory / "b.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"b\.safetensors, which is missing"):
        read_artifact(model_directory)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "", "..", 7])
def test_an_index_cannot_leave_the_directory(model_directory: Path, shard: object) -> None:
    index = model_directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ArtifactError, match="no file name"):
        read_artifact(model_directory)


def test_index_naming_a_tensor_that_is_not_there(model_directory: Path) -> None:
    index = {"weight_map": {"ghost": "model.safetensors"}}
    (model_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="ghost"):
        read_artifact(model_directory)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_refused(model_directory: Path, suffix: str) -> None:
    (model_directory / "model.safetensors").rename(model_directory / f"pytorch_model.{suffix}")
    with pytest.raises(UnsafeArtifactError, match="pickled") as fault:
        read_artifact(model_directory)
    assert fault.value.hint and "safetensors" in fault.value.hint


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(model_directory: Path, file: str) -> None:
    path = model_directory / file
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**table, "auto_map": {"AutoModel": "model.Mine"}}))
    with pytest.raises(UnsafeArtifactError, match="auto_map"):
        read_artifact(model_directory)
    assert read_artifact(model_directory, trust_remote_code=True).trust_remote_code


def test_wrong_directories(tmp_path: Path, model_directory: Path) -> None:
    with pytest.raises(UsageError, match="no such model directory"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="not a directory"):
        read_artifact(model_directory / "config.json")
    for text, words in (("{", "not JSON"), ("[]", "no JSON table")):
        (model_directory / "config.json").write_text(text)
        with pytest.raises(ArtifactError, match=words):
            read_artifact(model_directory)


def test_no_weights_and_unclear_weights(model_directory: Path) -> None:
    weights = model_directory / "model.safetensors"
    shutil.copy(weights, model_directory / "one.safetensors")
    weights.rename(model_directory / "two.safetensors")
    with pytest.raises(ArtifactError, match="2 safetensors files"):
        read_artifact(model_directory)
    (model_directory / "one.safetensors").unlink()
    assert read_artifact(model_directory).names()  # the only one is the one
    (model_directory / "two.safetensors").unlink()
    with pytest.raises(ArtifactError, match="has no weights"):
        read_artifact(model_directory)


def test_unreadable_file(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    for method in ("open", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(ArtifactError, match=r"cannot read .* Permission denied"):
                read_artifact(model_directory)


def test_a_directory_without_tokenizer_says_so(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="tokenizer"):
        artifact.tokenizer()


def test_quantize_config_beside(model_directory: Path) -> None:
    table = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    (model_directory / "quantize_config.json").write_text(json.dumps(table))
    found = read_artifact(model_directory)
    assert found.quantization == table
    assert found.summary().quantization == "gptq 4-bit g32 sym"


def test_a_file_swapped_after_opening(artifact: Artifact) -> None:
    file = artifact.path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        artifact.tensor("model.norm.weight")

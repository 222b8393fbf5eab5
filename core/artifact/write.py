"""Write a model directory: whole or not at all, read back before it is called done."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.core.artifact.card import model_card
from infopt.core.artifact.read import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Artifact,
    read_artifact,
    read_file,
    read_json,
)
from infopt.core.artifact.shards import ShardWriter
from infopt.core.errors import ArtifactError, UsageError
from infopt.core.files import MANIFEST, directory_atomically, sha256

if TYPE_CHECKING:
    from torch import Tensor

# What a tokenizer, a chat and a licence need besides the weights.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
SHARD_BYTES = 5 * 2**30
_OWN = (CONFIG, WEIGHTS, INDEX, MANIFEST)


def write_artifact(
    output: Path,
    *,
    source: Artifact,
    tensors: Iterable[tuple[str, "Tensor"]],
    config: Mapping[str, Any],
    extra: Mapping[str, str | bytes] | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Artifact:
    """Write `tensors` with the source's tokenizer as a new artifact, and return it as read back.

    `tensors` is consumed one at a time. Each tensor's bytes are hashed as it is handed in and again
    as read from the disk; the directory takes its name only when all agree. The same tensors give
    the same bytes. `extra` files are written beside and win over those copied from the source.
    Raises UsageError where `output` may not be replaced, ResourceError for a full disk.
    """
    keep_the_source(output, source)
    files: dict[str, str | bytes] = {}
    for name in _COPIED:
        if (source.path / name).is_file():
            files[name] = read_file(source.path / name)
    files["README.md"] = model_card(source, config, extra or {})
    files |= extra or {}
    return write_directory(
        output,
        tensors=tensors,
        config=config,
        files=files,
        replace=replace,
        shard_bytes=shard_bytes,
        trust_remote_code=source.trust_remote_code,
    )


def write_directory(
    output: Path,
    *,
    tensors: Iterable[tuple[str, "Tensor"]],
    config: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    name: str | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Artifact:
    """As `write_artifact`, with every other file given."""
    output = output.expanduser().absolute()
    for file in files:
        assert Path(file).name == file and file not in _OWN, f"{file} is no name for an extra file"
    with directory_atomically(output, replace=replace) as folder:
        _write_weights(folder, tensors, shard_bytes)
        (folder / CONFIG).write_text(_json(config))
        for file, content in files.items():
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        write_manifest(folder)
        read_artifact(folder, trust_remote_code=trust_remote_code)
    return read_artifact(output, name=name, trust_remote_code=trust_remote_code)


def write_manifest(folder: Path) -> None:
    """List every file of `folder` with its size and SHA-256 in its manifest.json."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(_json({"made_by": "infopt", "files": files}))


def verify_manifest(path: Path) -> None:
    """Hold every file to its size and digest; raises ArtifactError naming one that differs."""
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} has no {MANIFEST}", "only what infopt wrote has one")
    files = read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise ArtifactError(f"{path / MANIFEST} lists no files")
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise ArtifactError(f"{path / MANIFEST} is damaged at {name!r}")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing, though {MANIFEST} lists it")
        size = file.stat().st_size
        if size != entry.get("bytes"):
            raise ArtifactError(f"{file} has {size} bytes, {MANIFEST} says {entry.get('bytes')}")
        if sha256(file) != entry.get("sha256"):
            raise ArtifactError(f"{file} differs from the SHA-256 in {MANIFEST}")


def _write_weights(folder: Path, tensors: Iterable[tuple[str, "Tensor"]], shard_bytes: int) -> None:
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    shards = writer.finish()
    if not shards:
        raise ArtifactError("there are no tensors to write")
    if len(shards) == 1:
        shards[0].file.rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.file.rename(folder / file)
        weight_map.update(dict.fromkeys(shard.names, file))
    total = sum(shard.data_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(_json(index))


def keep_the_source(output: Path, source: Artifact) -> None:
    """The source is read while the output is written, so the output may not take its place."""
    here, there = output.resolve(), source.path.resolve()
    if here == there or here in there.parents:
        raise UsageError(
            f"the output {output} is the model that is read, or a folder around it",
            "choose another --output",
        )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

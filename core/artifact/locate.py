"""Find the model that a word names: the default, a directory, a GGUF file, or a hub id."""

import re
from pathlib import Path

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import UsageError
from infopt.core.progress import ProgressCallback, silent

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(
    model: str | None,
    *,
    progress: ProgressCallback = silent,
    trust_remote_code: bool = False,
) -> Artifact:
    """The artifact that `model` names; None and 'default' are the embedded model.

    A directory of that name wins over a hub id. A GGUF file is converted once into the cache.
    Raises UsageError where nothing of that name exists.
    """
    if model is None or model == "default":
        model = "/tmp/smol"
    path = Path(model).expanduser()
    if path.is_dir():
        return read_artifact(path, trust_remote_code=trust_remote_code)
    raise UsageError(f"no such model: {model}")

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from infopt.core.artifact.hub import download
from infopt.core.errors import ResourceError, UsageError
from infopt.core.progress import silent


def test_a_silent_hub_is_given_up_on(tmp_path: Path) -> None:
    """A server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        code = (
            "from infopt.core.artifact.hub import download\n"
            "from infopt.core.errors import ResourceError\n"
            "try: download('owner/name', lambda _: None)\n"
            "except ResourceError as e: print(e)\n"
        )
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert "cannot be reached" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.ConnectTimeout("slow"), ResourceError),
        (ConnectionError("offline"), ResourceError),
        ("RepositoryNotFoundError", UsageError),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Any, kind: type[Exception]
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_: object, **__: object) -> None:
        if isinstance(answer, Exception):
            raise answer
        request = httpx.Request("GET", "http://127.0.0.1")
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=request))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(kind, match="no-owner/no-name"):
        download("no-owner/no-name", silent)


def test_only_what_is_wanted_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def snapshot(repository: str, **settings: Any) -> str:
        asked.update(settings)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert download("owner/name", silent) == tmp_path
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt",
        "chat_template.jinja", "README.md", "pytorch_model.bin", "modeling_mine.py", "x.pt",
        "onnx/config.json", "original/model.safetensors", "consolidated.safetensors", "m.gguf",
    ]  # fmt: skip
    kept = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:6]

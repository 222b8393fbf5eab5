"""Schemathesis against a real server, by the server's own OpenAPI document."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)
CHECKS = (
    "not_a_server_error,content_type_conformance,negative_data_rejection,"
    "response_headers_conformance,unsupported_method"
)


@pytest.mark.slow
def test_schemathesis_finds_nothing(server: Any, tmp_path: Path) -> None:
    found = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", CHECKS, "--max-examples", "30", "--seed", "1"),
            *("--phases", "fuzzing", "--request-timeout", "30", "--no-color"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stdout[-6000:]
    assert "11 selected / 11 total" in found.stdout
    server.await_idle()

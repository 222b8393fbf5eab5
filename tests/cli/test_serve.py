"""Settings to a command line and back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infopt.cli import serve
from infopt.cli.main import run_app
from infopt.cli.serving import _command, _without_keys
from infopt.cli.verb import settings_for
from infopt.core.recipe.serve import ServeSettings

OTHERS: list[dict[str, Any]] = [
    {},
    {"prefix_caching": False, "batching": "static"},
    {"batching": "dynamic", "batch_wait_ms": 12.5, "prefix_host_bytes": 10**9},
    {"block_size": 32, "kv_blocks": 99, "max_batch_tokens": 64, "max_chunk_tokens": 32},
    {"max_running": 3, "max_model_len": 128, "watermark": 0.2, "port": 0, "model_name": "m"},
    {"host": "::1", "device": "cpu", "dtype": "float32", "seed": 7},
    {"kv_dtype": "int8", "deterministic": True, "kernels": "torch", "threads": 1},
    {"prefix_disk": "some/where", "prefix_disk_bytes": 2**20},
    {"tool_parser": "llama3-json", "pooling": "last"},
    {"activations": "int8", "repack_cache": False},
    {
        "api_key_file": "keys",
        "max_queued_requests": 7,
        "max_queued_tokens": 900,
        "max_body_bytes": 1000,
        "rate_limit": 1.5,
        "max_concurrency": 3,
        "request_timeout": 9.0,
        "drain_timeout": 0.0,
        "max_idle": 60.0,
        "log_file": "-",
        "otlp_endpoint": "http://127.0.0.1:4318",
        "tls_cert": "a.pem",
        "tls_key": "b.pem",
        "cors_origins": ("https://a.example", "*"),
    },
    {"engine": "vllm"},
]


@pytest.mark.parametrize("values", OTHERS, ids=str)
def test_a_server_beside_this_process_gets_the_same_settings(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[ServeSettings] = []

    def heard(model: str, given: dict[str, Any], common: Any) -> None:
        assert model == "somewhere"
        found = settings_for("serve", common, given)[0]
        assert isinstance(found, ServeSettings)
        told.append(found)

    monkeypatch.setattr(serve, "_serve", heard)
    artifact: Any = SimpleNamespace(path=Path("somewhere"), trust_remote_code=False)
    settings = ServeSettings(**values)
    words = _command(artifact, settings)
    assert run_app(words[words.index("serve") :]) == 0
    assert told == [settings]


def test_a_server_that_we_ask_ourselves_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_API_KEYS", "sk-alice-123")
    monkeypatch.setenv("INFOPT_CACHE", "somewhere")
    found = _without_keys()
    assert "INFOPT_API_KEYS" not in found and found["INFOPT_CACHE"] == "somewhere"


def test_every_setting_is_among_them() -> None:
    tried = {key for values in OTHERS for key in values}
    assert tried | {"ask"} == set(ServeSettings.model_fields)


@pytest.mark.parametrize("verb", ["serve", "bench"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-wait-ms", "5"], "batch_wait_ms is for batching: dynamic"),
        (["--batching", "static", "--batch-wait-ms", "5"], "batch_wait_ms is for batching"),
        (["--no-prefix-caching", "--prefix-host-bytes", "9"], "needs prefix_caching"),
        (["--no-prefix-caching", "--prefix-disk", "x"], "prefix_disk needs prefix_caching"),
        (["--prefix-disk-bytes", "9"], "prefix_disk_bytes needs prefix_disk"),
        (["--batching", "sometimes"], "sometimes"),
        (["--watermark", "1.0"], "watermark"),
        (["--max-chunk-tokens", "0"], "max_chunk_tokens"),
    ],
    ids=str,
)
def test_an_option_that_would_not_be_read_is_refused(
    verb: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app([verb, *words]) == 2
    assert said in capsys.readouterr().err


def test_options_of_the_engine_are_not_for_a_server_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_app(["bench", "--url", "http://127.0.0.1:9", "--no-prefix-caching"]) == 2
    assert "--prefix-caching is the server's to choose" in capsys.readouterr().err

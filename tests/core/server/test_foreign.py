"""Other engines: their words for our settings, and a real child process in their place."""

import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infopt.core.errors import EngineError, UsageError
from infopt.core.progress import Progress
from infopt.core.recipe.serve import ServeSettings
from infopt.core.server.foreign import foreign_command
from infopt.core.server.foreign_life import free_port, run_foreign, serve_file, serve_foreign


def command(engine: Any, **settings: Any) -> str:
    return " ".join(foreign_command(engine, "m", ServeSettings(engine=engine, **settings)))


def test_vllms_words() -> None:
    assert command("vllm") == "vllm serve m --host 127.0.0.1 --port 8000"
    found = command(
        "vllm",
        port=9,
        kv_dtype="fp8",
        max_running=64,
        prefix_caching=False,
        drain_timeout=5.0,
        max_model_len=2048,
    )
    for words in (
        *("--port 9", "--kv-cache-dtype fp8", "--max-num-seqs 64", "--no-enable-prefix-caching"),
        *("--shutdown-timeout 5", "--max-model-len 2048"),
    ):
        assert words in found


def test_sglangs_words() -> None:
    found = command("sglang", kv_dtype="fp8", prefix_caching=False, max_queued_requests=7)
    assert found.startswith(f"{sys.executable} -m sglang.launch_server --model-path m ")
    for words in ("--kv-cache-dtype fp8_e4m3", "--disable-radix-cache", "--max-queued-requests 7"):
        assert words in found


def test_transformers_words() -> None:
    found = command("transformers", device="cpu", dtype="float32", block_size=32)
    assert found.startswith("transformers serve m --continuous-batching")
    for words in ("--device cpu", "--dtype float32", "--cb-block-size 32"):
        assert words in found


def test_llama_cpps_words() -> None:
    found = command("llama.cpp", max_running=8, max_batch_tokens=1024, model_name="x")
    assert found.startswith("llama-server --model m ")
    for words in ("--parallel 8", "--batch-size 1024", "--alias x"):
        assert words in found
    trusting = foreign_command(
        "llama.cpp", "m", ServeSettings(engine="llama.cpp"), trust_remote_code=True
    )
    assert "--trust-remote-code" not in trusting, "a GGUF file brings no code"


def test_llama_cpp_is_not_to_be_had_from_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="there is no program 'llama-server'") as caught:
        serve_file(tmp_path / "m.gguf", ServeSettings(engine="llama.cpp"))
    assert "build or install llama.cpp" in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "settings", "name"),
    [
        ("vllm", {"api_key_file": "k"}, "api_key_file"),
        ("vllm", {"kv_dtype": "int8"}, "int8"),
        ("vllm", {"deterministic": True}, "deterministic"),
        ("sglang", {"max_idle": 3.0}, "max_idle"),
        ("transformers", {"model_name": "x"}, "model_name"),
        ("llama.cpp", {"max_model_len": 99}, "max_model_len"),
        ("transformers", {"kv_dtype": "fp8"}, "kv_dtype"),
    ],
)
def test_what_another_engine_does_not_have_is_refused(
    engine: Any, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(UsageError, match=name):
        command(engine, **settings)


def test_keys_of_the_environment_are_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_API_KEYS", "sk-alice-123")
    artifact: Any = SimpleNamespace(path=Path("m"), trust_remote_code=False)
    with pytest.raises(UsageError, match="let anybody in") as caught:
        serve_foreign(artifact, ServeSettings(engine="vllm"))
    assert "sk-alice" not in str(caught.value)


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="there is no program 'no-engine'"):
        run_foreign(["no-engine"], url="http://127.0.0.1:9", drain_s=1, progress=lambda _: None)


def test_an_engine_that_ends_by_itself() -> None:
    said: list[Progress] = []
    with pytest.raises(EngineError, match="exit code 3"):
        run_foreign(
            [sys.executable, "-c", "raise SystemExit(3)"],
            url=f"http://127.0.0.1:{free_port('127.0.0.1')}",
            drain_s=1,
            progress=said.append,
        )
    assert [each.stage for each in said] == ["starting"]


ENGINE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
LAUNCH = """
import sys
from infopt.core.server.foreign_life import run_foreign
run_foreign(sys.argv[2:], url=sys.argv[1], drain_s=1,
            progress=lambda p: print(p.stage, p.note, flush=True))
"""


def test_it_is_started_awaited_and_ended(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(ENGINE)}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    port = free_port("127.0.0.1")
    words = [f"http://127.0.0.1:{port}", str(program), str(port)]
    ours = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *words], stdout=subprocess.PIPE, text=True
    )
    assert ours.stdout is not None
    assert ours.stdout.readline() == f"starting {program} {port}\n"
    assert ours.stdout.readline() == f"serving listening on http://127.0.0.1:{port}\n"
    ours.send_signal(signal.SIGTERM)
    assert ours.wait(20) == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)

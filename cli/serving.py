"""A server as a child process of this command: started, asked, stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from infopt.core.errors import EngineError, UsageError
from infopt.core.recipe.serve import KEYS_VARIABLE, ServeSettings
from infopt.core.reports.serve import Answer, ServeReport

if TYPE_CHECKING:
    from infopt.core.artifact.read import Artifact

READY = "listening on "
STARTING = "starting  "
_ERROR = "infopt: error: "
_START_LIMIT_S = 600.0
_STOP_LIMIT_S = 30.0


class Model(Protocol):
    """What there is to serve: an artifact, or a file that another engine reads itself."""

    @property
    def path(self) -> Path: ...

    @property
    def trust_remote_code(self) -> bool: ...


class GgufFile:
    """A file for llama.cpp."""

    trust_remote_code = False

    def __init__(self, path: Path) -> None:
        self.path = path


def gguf_file(word: "str | Path | None") -> Path:
    """The file that llama.cpp is to serve; raises UsageError for anything else."""
    path = Path(word) if word is not None else None
    if path is None or path.suffix.lower() != ".gguf" or not path.is_file():
        raise UsageError(
            f"llama.cpp serves .gguf files, {word or 'the default model'} is none",
            "name a .gguf file as MODEL",
        )
    return path


class Server:
    """`infopt serve` beside this process; as a context, it is stopped on leaving."""

    def __init__(self, artifact: Model, settings: ServeSettings, log: Path) -> None:
        self.command = _command(artifact, settings)
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.foreign_command: str | None = None
        """Of another engine, as it was run."""
        self.startup_s = 0.0

    def __enter__(self) -> "Server":
        began = time.perf_counter()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._log_path.open("wb")
        # A session of its own: Ctrl-C reaches this command, which then stops the server.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,  # its closing, by whatever end of ours, ends the server
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=_without_keys(),
        )
        try:
            self.url = self._await_ready(began + _START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.perf_counter() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _await_ready(self, deadline: float) -> str:
        assert self._process is not None
        while time.perf_counter() < deadline:
            lines = self._log_path.read_text(errors="replace").splitlines()
            for line in lines:
                if line.startswith(STARTING) and self.foreign_command is None:
                    self.foreign_command = line.removeprefix(STARTING).strip()
                if READY in line:
                    return line.split(READY, 1)[1].split()[0]
            if self._process.poll() is not None:
                reason = lines[-1] if lines else f"exit code {self._process.returncode}"
                raise EngineError(f"the server did not start: {reason.removeprefix(_ERROR)}")
            time.sleep(0.1)
        raise EngineError(f"the server was not ready after {_START_LIMIT_S:.0f} s")

    def stop(self) -> None:
        """End the server and wait for it; safe to call twice."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._log is not None:
            self._log.close()


def _without_keys() -> dict[str, str]:
    """The environment less its API keys: this command asks the server it starts without one."""
    return {key: value for key, value in os.environ.items() if key != KEYS_VARIABLE}


def _command(artifact: Model, settings: ServeSettings) -> list[str]:
    """The command line that says these settings."""
    words = [sys.executable, "-m", "infopt.cli.attended", "serve", str(artifact.path)]
    if artifact.trust_remote_code:
        words.append("--trust-remote-code")
    for key, value in settings.model_dump(mode="json", exclude={"ask"}).items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option.removesuffix('s')}={each}" for each in value]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def ask_all(server: Server, artifact: "Artifact", settings: Any) -> ServeReport:
    """Ask every question as a chat, greedily, and report the answers."""
    import httpx

    answers: list[Answer] = []
    with httpx.Client(base_url=server.url, timeout=600) as client:
        name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for question in settings.ask:
            began = time.perf_counter()
            reply = client.post(
                "/v1/chat/completions",
                json={
                    "model": name,
                    "messages": [{"role": "user", "content": question}],
                    "temperature": 0,
                    "max_tokens": 48,
                },
            )
            if reply.is_error:
                raise EngineError(
                    f"the server answered {reply.status_code} to {question!r}: {reply.text[:200]}"
                )
            body = reply.json()
            answers.append(
                Answer(
                    question=question,
                    answer=body["choices"][0]["message"]["content"],
                    seconds=time.perf_counter() - began,
                    completion_tokens=body["usage"]["completion_tokens"],
                )
            )
    return ServeReport(
        model=artifact.summary(),
        url=server.url,
        startup_s=server.startup_s,
        answers=tuple(answers),
        provenance={"startup_s": "measured", "answers": "measured"},
    )

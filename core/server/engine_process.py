"""The engine's own process: take in messages, step, send out what the step brought.

Started as `python -m infopt.core.server.engine_process`. Its orders are one line of JSON on stdin;
the end of stdin means that the API process is gone, and ends this one too.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import zmq

from infopt.core.artifact.read import read_artifact
from infopt.core.errors import InfoptError
from infopt.core.libraries import hush
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.request import Joined, SamplingParams, StepOutput
from infopt.core.runtime.stats import EngineStats
from infopt.core.server import messages

LINGER_MS = 2000


class Engine(Protocol):
    """What the loop needs of an engine."""

    max_model_len: int
    cache_tokens: int
    joined: Sequence[Joined]

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def step(self) -> list[StepOutput]: ...

    def has_work(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def save_prefixes(self) -> None: ...


def run(engine: Engine, channel: "zmq.Socket[bytes]") -> None:
    """Serve until told to stop, or an error; idle, it sleeps in the socket and burns nothing."""
    channel.send(
        messages.pack("ready", max_model_len=engine.max_model_len, cache_tokens=engine.cache_tokens)
    )
    while True:
        if not engine.has_work():
            channel.poll()
        while channel.poll(0):
            message = messages.unpack(channel.recv())
            if message["kind"] == "stop":
                engine.save_prefixes()
                return
            _heed(engine, message, channel)
        if engine.has_work():
            _step(engine, channel)


def _step(engine: Engine, channel: "zmq.Socket[bytes]") -> None:
    outputs = [messages.output_to_map(output) for output in engine.step()]
    joined = [messages.joined_to_map(each) for each in engine.joined]
    if outputs or joined:
        channel.send(messages.pack("outputs", outputs=outputs, joined=joined))


def _heed(engine: Engine, message: messages.Message, channel: "zmq.Socket[bytes]") -> None:
    match message["kind"]:
        case "add":
            try:
                params = messages.params_from_map(message["params"])
                engine.add(message["id"], message["prompt"], params)
            except InfoptError as error:
                channel.send(messages.rejected(message["id"], error))
        case "abort":
            engine.abort(message["id"], message["index"])
        case "stats":
            channel.send(messages.pack("stats", stats=asdict(engine.stats())))
        case kind:
            raise AssertionError(f"unknown message {kind!r}")


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of stdin; a parent that was killed cannot clean up its folder."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _load(orders: dict[str, Any]) -> Engine:
    from infopt.core.runtime import engine as runtime

    artifact = read_artifact(
        Path(orders["artifact"]),
        name=orders["name"],
        trust_remote_code=orders["trust_remote_code"],
    )
    return runtime.Engine.load(artifact, EngineSettings.model_validate(orders["settings"]))


def main() -> int:
    """Exit status 0 when told to stop, 1 if the engine could not be loaded or broke.

    The API process hears why.
    """
    # A signal to the whole group is for the API process, which ends this one in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    hush()
    # What a load has to say: the API process shows what comes by this one's standard error.
    logging.basicConfig(level=logging.WARNING, format="infopt: %(message)s")
    logging.getLogger("infopt").setLevel(logging.INFO)
    orders = json.loads(_first_line())
    folder = Path(orders["address"].removeprefix("ipc://")).parent
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    context = zmq.Context()
    channel = context.socket(zmq.DEALER)
    channel.setsockopt(zmq.SNDHWM, 0)  # a slow API process never blocks a step
    channel.setsockopt(zmq.LINGER, LINGER_MS)
    channel.connect(orders["address"])
    try:
        run(_load(orders), channel)
        return 0
    except InfoptError as error:
        channel.send(messages.failed(error))
    except Exception as error:
        traceback.print_exc()
        channel.send(messages.failed(error))
    finally:
        channel.close()
        context.term()
    return 1


def _first_line() -> bytes:
    """Unbuffered, so that nothing but the end is left for the thread that waits for it."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            raise SystemExit(1)
        line += piece
    return line


if __name__ == "__main__":
    sys.exit(main())

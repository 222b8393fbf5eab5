"""Two processes train as one does."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infopt.core.errors import UsageError
from infopt.core.training.devices import Group, local_device, rank

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional
from infopt.core.recipe.train import TrainSettings
from infopt.core.training.data import split_windows
from infopt.core.training.loop import train

class Bigrams:
    def __init__(self):
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.unused = nn.Linear(2, 2)
    def parameters(self):
        layers = {"table": self.table, "out": self.out, "unused": self.unused}
        return {f"{n}.{k}": p for n, m in layers.items() for k, p in m.named_parameters()}
    def loss(self, tokens):
        logits = self.out(self.table(tokens[:, :-1].clamp(min=0)))
        follow = tokens[:, 1:].flatten()
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), follow, ignore_index=-1)}
    def after_step(self):
        pass

def run(folder):
    torch.set_num_threads(1)
    learner = Bigrams()
    rows = torch.randint(16, (12, 9), generator=torch.Generator().manual_seed(1))
    for number, row in enumerate(rows):
        row[4 + number % 5:] = -1
    settings = TrainSettings(steps=6, learning_rate=0.05, batch_tokens=45, micro_tokens=18,
                             sequence_length=9, precision="float32", save_every=4, patience=2)
    calls = []
    def evaluate():
        calls.append(1)
        return 1 / len(calls)
    result = train(learner, split_windows(rows, "random", 0), settings, seed=3,
                   device=torch.device("cpu"), identity={}, folder=folder, evaluate=evaluate)
    return {"losses": result.losses, "held_out": result.held_out, "tokens": result.tokens,
            "calls": len(calls),
            "out": learner.out.weight.detach().flatten().tolist()}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = run(folder / "state")
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "the group's threads have ended"
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Uneven shares of uneven windows; a parameter that nobody uses; the first one writes."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path)],
            env=os.environ | address | {"RANK": str(n), "LOCAL_RANK": str(n)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    alone = runpy.run_path(str(program))["run"](tmp_path / "alone")
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    both = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert [found["calls"] for found in both] == [7, 0], "the first process looks for all"
    for found in both:
        assert found["tokens"] == alone["tokens"]
        assert [tuple(pair) for pair in found["held_out"]] == alone["held_out"]
        for ours, theirs in zip(found["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        assert found["out"] == pytest.approx(alone["out"], abs=1e-5)
    assert both[0]["out"] == both[1]["out"]
    assert (tmp_path / "state" / "CURRENT").exists()


def test_windows_are_shared_and_none_is_left_out() -> None:
    cpu = torch.device("cpu")
    shares = [Group(number, 3, cpu).share([5, 6, 7, 8]) for number in range(3)]
    assert shares == [[5, 8], [6], [7]]
    with pytest.raises(UsageError, match="2 windows cannot be shared by 3"):
        Group(0, 3, cpu).share([1, 2])


def test_one_process_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert rank() == 0
    cuda = torch.device("cuda")
    assert local_device(cuda) == cuda
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank() == 1
    assert local_device(cuda) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")

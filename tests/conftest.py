"""What every room's tests share."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infopt.core.libraries import share_cores

if TYPE_CHECKING:
    from infopt.core.artifact.read import Artifact

share_cores()  # before any test loads torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    runpy.run_path(str(Path(__file__).with_name("fixtures") / "interpreter.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests alone come first: among several workers nobody waits for them then."""
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in quick)


# What a GPU is lent with may have torch, Triton and transformers and little else: there, `-m gpu`
# leaves out what needs more, and says so.
_NEEDED = ("pydantic", "platformdirs", "gguf")


def _left_out(config: pytest.Config) -> str | None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if config.option.markexpr != "gpu" or not missing:
        return None
    return f"tests but those of kernels are left out: {', '.join(missing)} not installed"


def pytest_report_header(config: pytest.Config) -> str | None:
    return _left_out(config)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (said := _left_out(config)) is not None:
        terminalreporter.write_line(f"SKIPPED {said}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    tests = Path(__file__).parent
    inside = collection_path.relative_to(tests).parts[:1] if collection_path != tests else ()
    alone = inside in (("cli",), ("core",), ("recipes",)) or inside == ("test_architecture.py",)
    return True if alone and _left_out(config) is not None else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU: none can be used here")


# Triton reads TRITON_INTERPRET where it is imported, for the whole process. Tests that are marked
# `interpreted` therefore run in a child, file by file, and here only their outcomes are told: the
# other tests of this process meet Triton as users do. With the variable set they run here.
_OUTCOMES = "INFOPT_TEST_OUTCOMES"
_told: dict[Path, dict[str, dict[str, Any]]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: keep what there is to tell."""
    file = os.environ.get(_OUTCOMES)
    if file is not None and (report.when == "call" or not report.passed):
        told = {"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        if report.skipped and isinstance(report.longrepr, tuple):
            told["text"] = report.longrepr[2]
        with Path(file).open("a") as out:
            out.write(json.dumps(told) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """In the parent: tell of a test what the child found."""
    if INTERPRETING or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    path = pyfuncitem.path
    if path not in _told:
        _told[path] = _run_interpreted(path, pyfuncitem)
    name = pyfuncitem.nodeid
    found = _told[path].get(name) or {"outcome": "failed", "text": _told[path][""]["text"]}
    if found["outcome"] == "skipped":
        pytest.skip(found["text"])
    if found["outcome"] == "failed":
        pytest.fail(f"under Triton's interpreter:\n{found['text']}", pytrace=False)
    return True


def _run_interpreted(path: Path, first: pytest.Function) -> dict[str, dict[str, Any]]:
    """Outcomes by test of all that were chosen of a file; under "" what the child wrote."""
    chosen = [
        item.nodeid
        for item in first.session.items
        if item.path == path and item.get_closest_marker("interpreted") is not None
    ]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
        env |= {"TRITON_INTERPRET": "1", _OUTCOMES: str(outcomes)}
        words = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout=0", *chosen]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            env=env, cwd=first.config.rootpath, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    told = {one["test"]: one for one in found}
    told[""] = {
        "text": f"the child told nothing of it:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    }
    return told


@pytest.fixture(scope="session")
def default_artifact() -> "Artifact":
    """The real default model."""
    from infopt.core.artifact.locate import locate

    return locate(None)


@pytest.fixture(autouse=True, scope="session")
def _leave_no_files() -> Iterator[None]:
    """A test suite that litters the tree fails."""
    root = Path(__file__).parents[1]
    before = set(root.iterdir())
    yield
    left = {path.name for path in set(root.iterdir()) - before} - {".pytest_cache", ".hypothesis"}
    assert not left, f"tests left files in the tree: {sorted(left)}"


@pytest.fixture(scope="session")
def tiny_model(default_artifact: "Artifact", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Llama with random weights and the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=default_artifact.config["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    default_artifact.tokenizer().save_pretrained(folder)
    return folder

from typing import Any

import pytest

from infopt.core.errors import MissingExtraError, ResourceError, UsageError
from infopt.core.text.hub import HubText, parse_hub, read_hub


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:wikitext:test:text", HubText("wikitext", None, "test", "text")),
        ("hub:a/b:train:t", HubText("a/b", None, "train", "t")),
        ("hub:a/b/c:train:t", HubText("a/b", "c", "train", "t")),
    ],
)
def test_parse(source: str, parts: HubText) -> None:
    assert parse_hub(source) == parts


@pytest.mark.parametrize("source", ["hub:", "hub:a", "hub:a:b", "hub:a::c", "hub:a/b/c/d:e:f",
                                    "hub:a//c:e:f", "hub:a:b:c:d"])  # fmt: skip
def test_bad_words(source: str) -> None:
    with pytest.raises(UsageError, match="names no data set"):
        parse_hub(source)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="datasets"):
        read_hub("hub:a/b:train:text")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ResourceError, match="Couldn't reach") as fault:
        read_hub("hub:a/b:train:text")
    assert "\n" not in str(fault.value)

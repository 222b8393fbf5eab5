from pathlib import Path
from typing import Any

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import validated
from infopt.core.recipe.bench import BenchSettings
from infopt.core.recipe.load import parse_sweep, parse_tokens
from infopt.core.recipe.recipe import dump_recipe, parse_recipe
from infopt.core.recipe.slo import MLPERF, parse_slo


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"request_rate": 2.0, "concurrency": 4}, "say max_concurrency"),
        ({"sweep": "concurrency=1,2", "trace": "x"}, "trace and sweep are two loads"),
        ({"sweep": "concurrency=1,2", "concurrency": 2}, "concurrency is not read with sweep"),
        ({"trace": "x", "request_rate": 2.0}, "request_rate is not read with trace"),
        ({"requests": 4, "duration": 2.0}, "two ends"),
        ({"find_capacity": True}, "find_capacity needs slo"),
        ({"find_capacity": True, "slo": "ttft=1s", "concurrency": 2}, "not read with find_cap"),
        ({"attainment": 0.9}, "attainment needs slo"),
        ({"url": "http://x", "engine": "vllm"}, "two targets"),
        ({"arrival": "poisson"}, "arrival is of an open loop"),
        ({"trace": "x", "arrival": "poisson"}, "arrival is of an open loop"),
        ({"request_rate": 1.0, "burstiness": 0.5}, "arrival: gamma go together"),
        ({"request_rate": 1.0, "arrival": "gamma"}, "arrival: gamma go together"),
        ({"max_concurrency": 3}, "max_concurrency bounds an open loop"),
        ({"speedup": 2.0}, "speedup is of a trace"),
        ({"prefix_tokens": 9}, "prefix_tokens is for workload: shared-prefix"),
        ({"turns": 2}, "turns is for workload: multi-turn"),
        ({"dataset": "x"}, "dataset is for workload: file"),
        ({"workload": "file"}, "needs dataset"),
        ({"trace": "x", "prompt_tokens": 9}, "has its own lengths"),
        ({"trace": "x", "workload": "rag"}, "workload: rag too"),
        ({"workload": "file", "dataset": "x", "prompt_tokens": 9}, "not read with workload"),
        ({"workload": "json", "endpoint": "completions"}, "goes through chat"),
        ({"slo": "ttft=200"}, "a time with its unit"),
        ({"slo": "ttft=0ms"}, "no time above zero"),
        ({"slo": "ttf=200ms"}, "did you mean 'ttft'"),
        ({"slo": "ttft=1s,ttft=2s"}, "two limits"),
        ({"slo": "fast"}, "is no limit"),
        ({"slo": "mlperf:llama3.1-8"}, "did you mean 'llama3.1-8b'"),
        ({"sweep": "speed=1"}, "a sweep is concurrency"),
        ({"sweep": "concurrency=1,1.5"}, "'1.5' is no level"),
        ({"sweep": "concurrency=1,inf"}, "'inf' is no level"),
        ({"sweep": "concurrency=2,2"}, "twice"),
        ({"sweep": "request-rate=0"}, "'0' is no level"),
        ({"sweep": "request-rate=1,x"}, "'x' is no level"),
        ({"prompt_tokens": "9-4"}, "a range goes"),
        ({"prompt_tokens": "many"}, "a whole number of tokens"),
        ({"prompt_tokens": True}, "a whole number of tokens"),
        ({"prompt_tokens": 4.5}, "a whole number of tokens"),
        ({"output_tokens": 0}, "a range goes"),
        ({"workload": "other"}, "workload"),
        ({"max_failed": 1.0}, "max_failed"),
    ],
    ids=str,
)
def test_what_contradicts_itself_or_would_not_be_read(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validated(BenchSettings, settings, "here")
    assert said in str(caught.value) and "here" in str(caught.value)


def test_lengths_and_their_defaults() -> None:
    assert BenchSettings().prompt_range == (128, 128) and BenchSettings().output_range == (32, 32)
    assert BenchSettings(workload="rag").prompt_range == (2048, 2048)
    assert BenchSettings(prompt_tokens="64-256").prompt_range == (64, 256)
    assert BenchSettings(prompt_tokens="64").prompt_tokens == 64
    assert parse_tokens("7-7") == (7, 7)


def test_sweeps_and_limits() -> None:
    assert parse_sweep("request_rate=0.5, 2") == ("request-rate", (0.5, 2.0))
    assert parse_slo("ttft=200ms, tpot=50000us,e2e=5s") == pytest.approx(
        {"ttft": 0.2, "tpot": 0.05, "e2e": 5.0}
    )
    assert parse_slo("mlperf:llama3.1-8b-interactive") == {"ttft": 0.5, "tpot": 0.03}
    assert all(set(limits) == {"ttft", "tpot"} for limits in MLPERF.values())


@pytest.mark.parametrize(
    ("settings", "open_loop"),
    [
        ({}, False),
        ({"sweep": "concurrency=1,2"}, False),
        ({"sweep": "request-rate=1,2"}, True),
        ({"request_rate": 1.0, "max_concurrency": 2, "arrival": "gamma", "burstiness": 2.0}, True),
        ({"trace": "x", "speedup": 2.0, "max_concurrency": 2}, True),
        ({"find_capacity": True, "slo": "ttft=1s", "request_rate": 2.0}, True),
    ],
    ids=str,
)
def test_open_and_closed(settings: dict[str, Any], open_loop: bool) -> None:
    assert BenchSettings(**settings).is_open is open_loop


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, None),
        ({"workload": "shared-prefix"}, None),
        ({"workload": "multi-turn"}, "workload: multi-turn"),
        ({"workload": "file", "dataset": "x"}, "workload: file"),
        ({"endpoint": "chat"}, "endpoint: chat"),
        ({"endpoint": "completions"}, "endpoint"),
        ({"scrape": True}, "scrape"),
        ({"api_key_env": "X"}, "api_key_env"),
    ],
    ids=str,
)
def test_what_only_a_server_can_do(settings: dict[str, Any], key: str | None) -> None:
    assert BenchSettings(**settings).needs_server == key


def test_a_recipe_written_out_is_read_again() -> None:
    step = {
        "bench": {
            "sweep": "request-rate=1,2", "slo": "mlperf:llama3.1-8b", "prompt_tokens": "8-16",
            "workload": "shared-prefix", "prefixes": 4,
        }
    }  # fmt: skip
    recipe = parse_recipe({"steps": [step]}, "r.yaml")
    import yaml

    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), str(Path("r.yaml"))) == recipe

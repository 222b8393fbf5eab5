"""Limits on latencies, as the command line and recipes say them: pure parsing, no judging."""

import math
import re
from collections.abc import Mapping

from infopt.core.recipe.base import nearest

LATENCIES = ("ttft", "ttfot", "tpot", "e2e")
"""What a limit may be set on; each is a time of one request."""
MLPERF: Mapping[str, Mapping[str, float]] = {
    "llama3.1-8b": {"ttft": 2.0, "tpot": 0.1},
    "llama3.1-8b-interactive": {"ttft": 0.5, "tpot": 0.03},
    "llama2-70b": {"ttft": 2.0, "tpot": 0.2},
    "llama2-70b-interactive": {"ttft": 0.45, "tpot": 0.04},
    "gpt-oss-120b": {"ttft": 3.0, "tpot": 0.08},
    "gpt-oss-120b-interactive": {"ttft": 2.0, "tpot": 0.015},
    "deepseek-r1": {"ttft": 2.0, "tpot": 0.08},
    "deepseek-r1-interactive": {"ttft": 1.5, "tpot": 0.015},
}
"""The limits of MLPerf Inference's server and interactive scenarios, in seconds."""
_PRESET = "mlperf:"
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_TIME = re.compile(r"([0-9]*\.?[0-9]+)(us|ms|s)")


def parse_slo(text: str) -> dict[str, float]:
    """'ttft=200ms,tpot=100ms' or 'mlperf:llama3.1-8b' -> limits in seconds.

    Raises ValueError, in one line, for what is neither.
    """
    if text.startswith(_PRESET):
        name = text.removeprefix(_PRESET)
        if name not in MLPERF:
            raise ValueError(f"there is no preset {text!r}: {nearest(name, list(MLPERF))}")
        return dict(MLPERF[name])
    limits: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{part.strip()!r} is no limit: such as ttft=200ms,tpot=100ms,e2e=5s")
        if key not in LATENCIES:
            raise ValueError(f"no latency is called {key!r}: {nearest(key, list(LATENCIES))}")
        if key in limits:
            raise ValueError(f"{key} has two limits")
        limits[key] = _seconds(key, value)
    return limits


def _seconds(key: str, value: str) -> float:
    found = _TIME.fullmatch(value)
    if found is None:
        raise ValueError(f"the limit of {key} is a time with its unit: 200ms, 5s (not {value!r})")
    seconds = float(found[1]) * _UNITS[found[2]]
    if not 0 < seconds < math.inf:
        raise ValueError(f"the limit of {key} is no time above zero: {value!r}")
    return seconds

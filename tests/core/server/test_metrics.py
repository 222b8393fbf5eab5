from dataclasses import asdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from infopt.core.runtime.stats import STEP_SIZES, EngineStats
from infopt.core.server.metrics import Metrics

VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens"),
    *("request_success", "num_preemptions", "admission_rejections"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds"),
    *("iteration_tokens_total", "cache_config_info"),
}


def stats(**values: Any) -> dict[str, Any]:
    sizes = [0] * (len(STEP_SIZES) + 1)
    zero = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    return asdict(EngineStats(**{**zero, "step_sizes": tuple(sizes), **values}))


def samples(metrics: Metrics) -> dict[str, float]:
    """By name and labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "m"
            found[sample.name + "".join(f" {k}={v}" for k, v in sorted(labels.items()))] = (
                sample.value
            )
    return found


def test_vllms_names_under_our_prefix() -> None:
    metrics = Metrics("m", {"block_size": "16"})
    families = {f.name for f in text_string_to_metric_families(metrics.text().decode())}
    assert {f"infopt:{name}" for name in VLLM} - families == set()
    for name in ("kv_blocks_used", "kv_blocks_total"):
        assert f"infopt:{name}" in families


def test_counters_go_on_over_a_restart_and_gauges_fall_to_nothing() -> None:
    metrics = Metrics("m")
    sizes = [1, 2] + [0] * (len(STEP_SIZES) - 1)
    first = stats(prefix_queries=70, preemptions=2, tokens=5, blocks_total=8, blocks_used=4)
    metrics.engine.heard({**first, "step_sizes": sizes})
    found = samples(metrics)
    assert found["infopt:kv_cache_usage_perc"] == 0.5 and found["infopt:engine_up"] == 1
    metrics.engine.lost()
    found = samples(metrics)
    assert found["infopt:prefix_cache_queries_total"] == 70 and found["infopt:engine_up"] == 0
    assert found["infopt:kv_blocks_used"] == 0
    metrics.engine.heard({**stats(prefix_queries=5, tokens=3), "step_sizes": sizes})
    found = samples(metrics)
    assert found["infopt:prefix_cache_queries_total"] == 75
    assert found["infopt:num_preemptions_total"] == 2
    assert found["infopt:iteration_tokens_total_sum"] == 8
    assert found["infopt:iteration_tokens_total_count"] == 6
    assert found["infopt:iteration_tokens_total_bucket le=1.0"] == 2


def test_what_requests_met() -> None:
    metrics = Metrics("m")
    metrics.answered("stop")
    metrics.rejected("queue_full")
    metrics.responded("/v1/models", 200, "alice")
    metrics.ttft.observe(0.3)
    found = samples(metrics)
    assert found["infopt:request_success_total finished_reason=stop"] == 1
    assert found["infopt:admission_rejections_total reason=queue_full"] == 1
    assert found["infopt:http_requests_total client=alice path=/v1/models status=200"] == 1
    assert found["infopt:time_to_first_token_seconds_count"] == 1

import pytest

from infopt.core.bench.scrape import parse_metrics, summed

TEXT = """\
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
infopt:num_requests_waiting{model_name="m"} 7.0
vllm:kv_cache_usage_perc{model_name="m"} 2.5e-01
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 4.0
process_cpu_seconds_total 12.5
infopt:engine_up NaN
"""


def test_gauges_of_both_names_summed_over_labels() -> None:
    found = parse_metrics(TEXT)
    assert found["num_requests_running"] == 5.0 and found["num_requests_waiting"] == 7.0
    assert found["kv_cache_usage_perc"] == 0.25
    assert "process_cpu_seconds_total" not in found and "engine_up" not in found
    assert parse_metrics("<html>no</html>") == {}


def test_medians_maxima_and_increases() -> None:
    seen = [
        (
            float(n),
            {
                "num_requests_running": float(n),
                "prefix_cache_queries_total": 100.0 + 10 * n,
                "prefix_cache_hits_total": 50.0 + 4 * n,
                "num_preemptions_total": 2.0 if n < 2 else 5.0,
            },
        )
        for n in range(4)
    ]
    found = summed(seen)
    assert found is not None and found.samples == 4
    assert (found.running_median, found.running_max) == (1.5, 3.0)
    assert found.waiting_median is None and found.kv_use_max is None
    assert found.prefix_hit_share == pytest.approx(0.4) and found.preemptions == 3.0
    assert [sample.time for sample in found.timeline] == [0.0, 1.0, 2.0, 3.0]
    assert found.timeline[2].running == 2.0 and found.timeline[2].kv_use is None


def test_a_counter_that_began_anew() -> None:
    seen = [(0.0, {"num_preemptions_total": 9.0}), (1.0, {"num_preemptions_total": 2.0})]
    found = summed(seen)
    assert found is not None and found.preemptions == 2.0


def test_a_long_time_line_is_thinned() -> None:
    found = summed([(float(n), {"num_requests_running": 1.0}) for n in range(5000)])
    assert found is not None and len(found.timeline) == 300
    assert (found.timeline[0].time, found.timeline[-1].time) == (0.0, 4999.0)


def test_nothing_seen_is_nothing() -> None:
    assert summed([]) is None

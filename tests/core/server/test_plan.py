from pathlib import Path

import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.recipe.serve import EngineSettings, ServeSettings
from infopt.core.server.plan import plan_serve


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_what_it_takes(tiny_model: Path, dtype: str, size: int) -> None:
    artifact = read_artifact(tiny_model)
    settings = ServeSettings(dtype=dtype, kv_blocks=10, block_size=8, model_name="m", port=81)
    plan = plan_serve(artifact, settings)
    weights = artifact.summary().parameters * size
    cache = 10 * 8 * 2 * 2 * 2 * 16 * size  # blocks, slots, layers, k and v, heads, head size
    twice = plan_serve(artifact, settings.model_copy(update={"kv_blocks": 20}))
    assert twice.memory_bytes - plan.memory_bytes == cache
    assert plan.memory_bytes > weights + cache
    assert dtype in plan.actions[0] and "10 blocks of 8" in plan.actions[1]
    assert "'m' on 127.0.0.1:81" in plan.actions[2]


def test_an_engine_alone_is_not_served(tiny_model: Path) -> None:
    plan = plan_serve(read_artifact(tiny_model), EngineSettings(max_running=2, max_model_len=64))
    assert len(plan.actions) == 2 and "8 blocks of 16" in plan.actions[1]


def test_a_quantized_cache_is_said_and_counted(tiny_model: Path) -> None:
    artifact = read_artifact(tiny_model)
    settings = EngineSettings(max_running=2, max_model_len=64, dtype="float32")
    wide = plan_serve(artifact, settings)
    asked = plan_serve(artifact, settings.model_copy(update={"kv_dtype": "int8"}))
    assert "in int8, with a scale a head and token" in asked.actions[2]
    assert wide.memory_bytes - asked.memory_bytes == 128 * 2 * 2 * 2 * (16 * 4 - (16 + 4))
    artifact.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    }
    plan = plan_serve(artifact, settings)
    assert len(plan.actions) == 3 and "in fp8, with its own scales" in plan.actions[2]
    assert "of weights as float32" in plan.actions[0]


def test_a_second_tier_takes_memory_too(tiny_model: Path) -> None:
    settings = EngineSettings(max_running=2, max_model_len=64)
    plan = plan_serve(read_artifact(tiny_model), settings)
    more = settings.model_copy(update={"prefix_host_bytes": 2**30})
    tiered = plan_serve(read_artifact(tiny_model), more)
    assert tiered.memory_bytes - plan.memory_bytes == 2**30
    assert "1.00 GiB of prefixes" in tiered.actions[2]
    more = settings.model_copy(update={"prefix_disk": "some/where"})
    on_disk = plan_serve(read_artifact(tiny_model), more)
    assert on_disk.memory_bytes == plan.memory_bytes
    assert "4.00 GiB of prefixes" in on_disk.actions[2] and "some/where" in on_disk.actions[2]

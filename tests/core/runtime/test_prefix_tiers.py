"""What the pool gives up goes to host memory and to disk, and comes back as it was or is computed.

Preemption is by swap where there is a tier: only the last block, if it is not full, is lost.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams

MakeEngine = Callable[..., Engine]
NEW = 8
PROMPTS = 5
LENGTH = 24
FULL = 20
"""Of each prompt's tokens, those of its full blocks that may be found: the last is not."""


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def finish(engine: Engine) -> dict[tuple[str, int], list[int]]:
    made: dict[tuple[str, int], list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            assert output.finish_reason in (None, "length")
            made.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        engine.check()
    assert engine.stats().blocks_used == 0
    return made


def one_by_one(engine: Engine) -> list[list[int]]:
    """Greedy answers to prompts of which the pool holds one or two."""
    found = []
    for seed in range(PROMPTS):
        engine.add("x", prompt_of(LENGTH, seed), SamplingParams(NEW, temperature=0))
        found.append(finish(engine)["x", 0])
    return found


def hits_of(engine: Engine) -> tuple[list[list[int]], int]:
    before = engine.stats().prefix_hits
    return one_by_one(engine), engine.stats().prefix_hits - before


@pytest.fixture
def wanted(make_engine: MakeEngine) -> list[list[int]]:
    return one_by_one(make_engine(prefix_caching=False))


def block_bytes(engine: Engine) -> int:
    return sum(layer[0].nbytes for layer in engine._runner.cache.layers)


@pytest.mark.parametrize("host_blocks", [0, 3, 12])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_restart_finds_what_was_evicted(
    make_engine: MakeEngine, tmp_path: Path, host_blocks: int, kv_dtype: str
) -> None:
    wanted = one_by_one(make_engine(kv_dtype=kv_dtype, prefix_caching=False))
    small = make_engine(kv_blocks=8)
    settings = {
        "kv_blocks": 8,
        "kv_dtype": kv_dtype,
        "prefix_disk": str(tmp_path / "kv"),
        "prefix_host_bytes": host_blocks * block_bytes(make_engine(kv_dtype=kv_dtype)),
    }
    engine = make_engine(**settings)
    assert hits_of(engine) == (wanted, 0)
    assert hits_of(engine) == (wanted, PROMPTS * FULL), "nothing is lost on the way down"
    stats = engine.stats()
    assert stats.disk_bytes == sum(f.stat().st_size for f in (tmp_path / "kv").iterdir()) > 0
    assert bool(stats.host_bytes) == bool(host_blocks)
    again = make_engine(**settings)
    assert again.stats().disk_bytes == stats.disk_bytes
    found, hits = hits_of(again)
    assert found == wanted
    # What pool and host memory held at the end is not on disk: it takes a prefix or two.
    assert hits >= (PROMPTS - 2 - host_blocks // 6) * FULL
    assert hits_of(small)[1] == hits_of(small)[1] == small.stats().disk_bytes == 0


@pytest.mark.parametrize("host_blocks", [0, 3, 100])
def test_what_is_saved_at_the_end_is_found_whole(
    make_engine: MakeEngine, tmp_path: Path, wanted: list[list[int]], host_blocks: int
) -> None:
    settings = {
        "kv_blocks": 20,
        "prefix_disk": str(tmp_path / "kv"),
        "prefix_host_bytes": host_blocks * block_bytes(make_engine()),
    }
    engine = make_engine(**settings)
    one_by_one(engine)
    engine.add("x", prompt_of(9, seed=99), SamplingParams(NEW, temperature=0))
    engine.step()  # of one that runs, too, as far as it is computed
    for _ in range(2):
        engine.save_prefixes()
        engine.check()
        files = sorted((tmp_path / "kv").iterdir())
        assert len(files) == PROMPTS * ((LENGTH + NEW - 1) // 4) + 9 // 4
    assert hits_of(make_engine(**settings)) == (wanted, PROMPTS * FULL)
    make_engine(kv_blocks=20, prefix_host_bytes=10**6).save_prefixes()  # nowhere to: nothing


def test_other_weights_other_formats_nothing_found(
    make_engine: MakeEngine, tiny_reference: tuple[Artifact, Any], tmp_path: Path
) -> None:
    settings = {"kv_blocks": 8, "prefix_disk": str(tmp_path / "kv")}
    one_by_one(make_engine(**settings))
    torch.manual_seed(1)
    config = LlamaConfig(**tiny_reference[1].config.to_dict())
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    plain = {"dtype": "float32", "device": "cpu", "block_size": 4}
    other = read_artifact(tmp_path / "other")
    alone = Engine.load(other, EngineSettings(**plain, kv_blocks=32, prefix_caching=False))
    beside = Engine.load(other, EngineSettings(**plain, **settings))
    assert hits_of(beside) == (one_by_one(alone), 0)
    for changes in ({"kv_dtype": "int8"}, {"kv_dtype": "fp8"}, {"block_size": 8},
                    {"dtype": "bfloat16"}, {"deterministic": True}):  # fmt: skip
        bare = make_engine(**{"kv_blocks": 32, **changes, "prefix_caching": False})
        assert hits_of(make_engine(**{**settings, **changes})) == (one_by_one(bare), 0), changes
    assert hits_of(make_engine(**settings))[1] > 0


@pytest.mark.parametrize("host", [0, 3000])
@pytest.mark.parametrize("harm", ["delete", "cut", "flip", "swap"])
def test_files_that_are_lost_or_harmed_are_computed_again(
    make_engine: MakeEngine, tmp_path: Path, wanted: list[list[int]], harm: str, host: int
) -> None:
    """Every other file, under the engine's feet: what it was about to restore is not there."""
    folder = tmp_path / "kv"
    settings = {"kv_blocks": 8, "prefix_disk": str(folder), "prefix_host_bytes": host}
    engine = make_engine(**settings)
    one_by_one(engine)
    files = sorted(folder.iterdir())
    for index in range(0, len(files) - 1, 2):
        match harm:
            case "delete":
                files[index].unlink()
            case "cut":
                files[index].write_bytes(files[index].read_bytes()[:-4])
            case "flip":
                data = bytearray(files[index].read_bytes())
                data[len(data) // 2] ^= 16
                files[index].write_bytes(data)
            case "swap":
                files[index].write_bytes(files[index + 1].read_bytes())
    found, hits = hits_of(engine)
    assert found == wanted and hits < PROMPTS * FULL
    assert hits_of(engine) == (wanted, PROMPTS * FULL), "and written again"


def test_the_limit_holds_and_two_engines_share_a_folder(
    make_engine: MakeEngine, tmp_path: Path, wanted: list[list[int]]
) -> None:
    one = block_bytes(make_engine()) + 40
    settings = {
        "kv_blocks": 8, "prefix_disk": str(tmp_path / "kv"), "prefix_disk_bytes": 9 * one
    }  # fmt: skip
    engines = [make_engine(**settings) for _ in range(2)]
    for _ in range(3):
        for engine in engines:
            assert one_by_one(engine) == wanted
            assert 0 < engine.stats().disk_bytes <= 9 * one
            assert sum(f.stat().st_size for f in (tmp_path / "kv").iterdir()) <= 10 * one


def test_what_does_not_fit_together_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    for values, said in (
        ({"prefix_disk": "x", "prefix_caching": False}, "prefix_disk needs prefix_caching"),
        ({"prefix_disk_bytes": 10**9}, "prefix_disk_bytes needs prefix_disk"),
        ({"prefix_disk": ""}, "names no folder"),
    ):
        with pytest.raises(ValueError, match=said):
            EngineSettings(**values)
    with pytest.raises(UsageError, match="holds no block"):
        make_engine(prefix_disk=str(tmp_path / "kv"), prefix_disk_bytes=10)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        make_engine(prefix_disk=str(tmp_path / "file"))


@pytest.mark.parametrize("tier", ["host", "disk", "both"])
@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("n", [1, 2])
def test_a_preempted_request_computes_less_than_a_block_again(
    make_engine: MakeEngine, tmp_path: Path, tier: str, budget: int, n: int
) -> None:
    """Pools of every size that preempts: each time only the last block, if not full, is lost."""
    params = SamplingParams(20, temperature=0, ignore_eos=True, n=n)
    prompts = [prompt_of(length, seed=length) for length in (18, 19, 20, 21, 22)]
    plenty = make_engine(kv_blocks=200, prefix_caching=False, max_batch_tokens=budget)
    for index, prompt in enumerate(prompts):
        plenty.add(str(index), prompt, params)
    wanted = finish(plenty)
    preempted = 0
    for kv_blocks in range(11, 31, 2):
        settings: dict[str, Any] = {}
        if tier != "disk":
            settings["prefix_host_bytes"] = 10**6 if tier == "host" else 20_000
        if tier != "host":
            settings["prefix_disk"] = str(tmp_path / str(kv_blocks))
        engine = make_engine(kv_blocks=kv_blocks, max_batch_tokens=budget, **settings)
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, params)
        assert finish(engine) == wanted
        again = engine.stats().tokens - plenty.stats().tokens
        assert again <= 3 * engine.stats().preemptions, kv_blocks
        preempted += engine.stats().preemptions
    assert preempted > 20

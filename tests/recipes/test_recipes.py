"""Every recipe that comes with infopt loads, and runs on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infopt.cli.main import run_app
from infopt.core.recipe.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    "quantize": {"calibration": {"samples": 4, "sequence_length": 32}},
    "prune": {"calibration": {"samples": 4, "sequence_length": 64}, "retrain": 2, "layers": 1},
    "distill": {"steps": 2, "batch_tokens": 64, "micro_tokens": 64, "sequence_length": 32},
    "evaluate": {"tokens": 256, "context": 64, "max_ppl_increase": 10.0},
    "profile": {"prompt_tokens": 16, "output_tokens": 2, "repeats": 1},
    "serve": {"kv_blocks": 64, "max_model_len": 256},
    "bench": {
        "requests": 2,
        "concurrency": 2,
        "prompt_tokens": 8,
        "output_tokens": 4,
        "kv_blocks": 64,
    },
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.steps
    assert recipe.description


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs_small(path: Path, tiny_model: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    content["model"] = str(tiny_model)
    for step in content["steps"]:
        ((verb, settings),) = step.items()
        for key in ("baseline", "teacher"):
            if settings.get(key):
                settings[key] = str(tiny_model)
        if verb == "bench" and "request_rate" in settings:
            settings.update({"request_rate": 50.0, "prefix_tokens": 8, "prompt_tokens": 8})
            settings.update({"requests": 2, "output_tokens": 4, "kv_blocks": 64})
            continue
        short = {"qat": {"steps": 2}, "autoround": {"iterations": 2}}
        settings.update(short.get(settings.get("method", ""), {}))
        settings.update(
            {
                k: v
                for k, v in SMALL[verb].items()
                if k in settings or k not in ("max_ppl_increase", "retrain", "layers")
            }
        )
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(content))
    assert run_app(["run", str(small), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "report.json").is_file()

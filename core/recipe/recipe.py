"""A recipe: an ordered list of steps with their settings."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import Settings, nearest, validated
from infopt.core.recipe.bench import BenchSettings
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.serve import ServeSettings

VERBS: dict[str, type[Settings]] = {
    "quantize": QuantizeSettings,
    "evaluate": EvaluateSettings,
    "profile": ProfileSettings,
    "serve": ServeSettings,
    "bench": BenchSettings,
}
WRITING = frozenset({"quantize"})
"""The verbs that write an artifact, and so can be given an `output`."""


class Step(Settings):
    """One verb with its settings; `model` and `output` say what it reads and writes."""

    verb: str
    settings: Settings
    model: str | None = None
    """An artifact, or the `output` of an earlier step; default: the newest artifact so far."""
    output: str | None = None


class Recipe(Settings):
    """Steps in their order."""

    name: str
    description: str = ""
    model: str | None = None
    steps: tuple[Step, ...]


def find_recipe(word: str) -> Path:
    """The file that a word names: a path, or a recipe of infopt's own, such as `run/demo`."""
    path = Path(word)
    if path.exists():
        return path
    home = Path(str(files("infopt.recipes")))
    shipped = {str(file.relative_to(home).with_suffix("")): file for file in home.rglob("*.yaml")}
    if word in shipped:
        return shipped[word]
    raise RecipeError(f"there is no recipe {word}", nearest(word, list(shipped)))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file; raises RecipeError naming file, step and key."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"the recipe {path} is not valid YAML: {reason}") from None
    return parse_recipe(content, str(path))


def parse_recipe(content: object, where: str) -> Recipe:
    """Validate the content of a YAML document."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where} is not a recipe", "a recipe is a mapping with the key 'steps'")
    known = [key for key in Recipe.model_fields]
    for key in content:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} in {where}", nearest(str(key), known))
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(
            f"{where} has no steps", "write 'steps:' and a list such as '- quantize: {bits: 4}'"
        )
    parsed = tuple(_parse_step(step, f"{where}, step {i}") for i, step in enumerate(steps, 1))
    rest = {key: value for key, value in content.items() if key != "steps"}
    return validated(Recipe, {"name": Path(where).stem, **rest, "steps": parsed}, where)


def _parse_step(step: object, where: str) -> Step:
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            f"{where} is not a step",
            "a step is one verb with its settings: '- quantize: {bits: 4}'",
        )
    verb, body = next(iter(step.items()))
    if verb not in VERBS:
        raise RecipeError(f"unknown verb {verb!r} in {where}", nearest(str(verb), list(VERBS)))
    body = {} if body is None else body
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where} ({verb}): settings are a mapping, not {body!r}")
    values: dict[str, Any] = dict(body)
    keys = _step_keys(str(verb))
    artifact = {key: values.pop(key) for key in keys if key in values}
    settings = validated(VERBS[verb], values, f"{where} ({verb})")
    return validated(Step, {"verb": verb, "settings": settings, **artifact}, f"{where} ({verb})")


def _step_keys(verb: str) -> tuple[str, ...]:
    return ("model", "output") if verb in WRITING else ("model",)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with every setting written out, so that it can be read again."""
    steps: list[dict[str, Any]] = []
    for step in recipe.steps:
        body = {
            key: getattr(step, key)
            for key in _step_keys(step.verb)
            if getattr(step, key) is not None
        }
        steps.append({step.verb: {**body, **step.settings.model_dump(mode="json")}})
    head = recipe.model_dump(mode="json", exclude={"steps"}, exclude_none=True)
    return yaml.safe_dump({**head, "steps": steps}, sort_keys=False, allow_unicode=True)

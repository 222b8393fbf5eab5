"""A recipe: an ordered list of steps with their settings."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import Settings, nearest, validated
from infopt.core.recipe.bench import BenchSettings
from infopt.core.recipe.convert import ConvertSettings
from infopt.core.recipe.distill import DistillSettings
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.kv_heads import KvHeadsSettings
from infopt.core.recipe.order import check_order
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.prune import PruneSettings
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.serve import ServeSettings

VERBS: dict[str, type[Settings]] = {
    "quantize": QuantizeSettings,
    "prune": PruneSettings,
    "distill": DistillSettings,
    "convert": ConvertSettings,
    "evaluate": EvaluateSettings,
    "profile": ProfileSettings,
    "serve": ServeSettings,
    "bench": BenchSettings,
}
WRITING = frozenset({"quantize", "prune", "distill", "convert"})
"""The verbs that write an artifact, and so can be given an `output`."""


def settings_of(verb: str, values: Mapping[str, Any]) -> type[Settings]:
    """The settings that a verb's values are read into: `convert` with `kv_heads` changes the model,
    without them its checkpoint format."""
    return KvHeadsSettings if verb == "convert" and "kv_heads" in values else VERBS[verb]


def _component(name: str) -> str:
    if not name.strip() or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError("a name is that of one folder, not a path")
    return name


FolderName = Annotated[str, AfterValidator(_component)]


class Step(Settings):
    """One verb with its settings; `model` and `output` say what it reads and writes."""

    verb: str
    settings: Settings
    model: str | None = None
    """An artifact, or the `output` of an earlier step; default: the newest artifact so far."""
    output: FolderName | None = None


class Recipe(Settings):
    """Steps in their order."""

    name: FolderName
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


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, where YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                mark = key.start_mark
                raise RecipeError(
                    f"the key {key.value!r} is there twice, again in line {mark.line + 1} "
                    f"of {mark.name}"
                )
            seen.add(key.value)
        return node


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file; raises RecipeError naming file, step and key."""
    try:
        with path.open("rb") as stream:
            content = yaml.load(stream, _Loader)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, and the like
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
    _each_its_own_output(parsed, where)
    check_order(parsed, where)
    rest = {key: value for key, value in content.items() if key != "steps"}
    return validated(Recipe, {"name": Path(where).stem, **rest, "steps": parsed}, where)


def _each_its_own_output(steps: Sequence[Step], where: str) -> None:
    writers: dict[str, int] = {}
    for number, step in enumerate(steps, 1):
        if step.output is None:
            continue
        if step.output in writers:
            raise RecipeError(
                f"steps {writers[step.output]} and {number} of {where} both write {step.output!r}",
                "give each an output of its own",
            )
        writers[step.output] = number


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
    settings = validated(settings_of(str(verb), values), values, f"{where} ({verb})")
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

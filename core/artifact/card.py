"""The model card (README.md) of an artifact."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infopt.core.artifact.count import describe_quantization
from infopt.core.artifact.read import Artifact

_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    source: Artifact, config: Mapping[str, Any], extra: Mapping[str, str | bytes]
) -> str:
    """Base model, licence if known, what was done, and the recipe if `extra` has a recipe.yaml."""
    front = card_data(source.path)
    licence = front.get("license")
    base = str(front.get("base_model") or source.name)
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["infopt"]}
    if licence:
        head["license"] = licence
    if _HUB_ID.fullmatch(base):
        head["base_model"] = base
    quantization = describe_quantization(config.get("quantization_config"))
    done = f"Weights: {quantization}." if quantization else "Weights: not quantized."
    lines = [
        render_front(head),
        f"# {source.name}, made with infopt",
        "",
        f"- Base model: {base}",
        f"- {done}",
        f"- Licence: {licence or 'not stated by the base model; see there before sharing this'}",
        "- Files and their SHA-256: `manifest.json`",
    ]
    recipe = extra.get("recipe.yaml")
    if recipe is not None:
        text = recipe.decode() if isinstance(recipe, bytes) else recipe
        lines += ["", "Made by this recipe:", "", "```yaml", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def render_front(head: Mapping[str, Any]) -> str:
    """The YAML block that a hub reads."""
    return "---\n" + yaml.safe_dump(dict(head), sort_keys=True) + "---\n"


def card_data(path: Path) -> dict[str, Any]:
    """The YAML block at the top of a directory's README.md; empty where none can be read."""
    try:
        found = _FRONT.match((path / "README.md").read_text(errors="replace"))
        data = yaml.safe_load(found.group(1)) if found else None
    except (OSError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}

"""A report as one page of HTML: nothing to fetch, nothing to run."""

import json
import re
import shlex
from importlib.resources import files
from typing import Any

import jinja2

from infopt.core.reports import figures
from infopt.core.reports.page import Fact, Facts
from infopt.core.reports.schema import Making, ModelSummary, Report
from infopt.core.reports.sections import sections, title
from infopt.core.reports.words import seconds, size

_PAGE = "page.html.j2"
# What XML has no place for, and no browser shows.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def to_html(report: Report) -> str:
    """The page of a report: its findings, tables and plots, and how it was made.

    It is HTML that is also well-formed XML, with its style and its figures inside; all text of the
    report is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        finalize=_clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_PAGE).render(
        title=title(report),
        model=_model(report.model) if report.model else None,
        warnings=report.warnings,
        sections=sections(report),
        making=_making(report.made) if report.made else None,
        settings=_settings(report.made) if report.made else "",
        frame={
            "width": figures.WIDTH,
            "height": figures.HEIGHT,
            "left": figures.LEFT,
            "right": figures.WIDTH - figures.RIGHT,
            "top": figures.TOP,
            "bottom": figures.HEIGHT - figures.BOTTOM,
        },
    )


def _template(name: str) -> str:
    return (files("infopt.core.reports") / "templates" / name).read_text("utf-8")


def _clean(value: Any) -> Any:
    """Text without the characters that would break the page."""
    if not isinstance(value, str) or not _CONTROL.search(value):
        return value
    return type(value)(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", value))


def _model(model: ModelSummary) -> Facts:
    return Facts(
        (
            Fact("model", model.name),
            Fact("architecture", model.architecture),
            Fact("parameters", f"{model.parameters:,}"),
            Fact("weights", f"{size(model.bytes)}, {model.quantization or 'not quantized'}"),
            Fact("path", model.path),
        )
    )


def _making(made: Making) -> Facts:
    where = made.environment
    packages = ", ".join(f"{name} {version}" for name, version in where.packages.items())
    return Facts(
        (
            Fact("command", shlex.join(made.argv)),
            Fact("began", made.created),
            Fact("took", seconds(made.seconds)),
            Fact("seed", "–" if made.seed is None else str(made.seed)),
            Fact("device", where.device),
            Fact("processor", f"{where.cpu}, {where.threads} threads"),
            Fact("memory", size(where.memory_bytes)),
            Fact("system", f"{where.platform}, Python {where.python}"),
            Fact("infopt", where.infopt),
            Fact("packages", packages or "–"),
        )
    )


def _settings(made: Making) -> str:
    return json.dumps(made.settings, indent=1, ensure_ascii=False, default=str)

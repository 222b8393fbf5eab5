"""What a report's page is made of: plain values, drawn by templates/page.html.j2."""

from dataclasses import dataclass
from typing import ClassVar

from infopt.core.reports.schema import Origin


@dataclass(frozen=True, slots=True)
class Fact:
    """A term, its value, and where the value comes from."""

    term: str
    value: str
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    kind: ClassVar[str] = "facts"
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Notes:
    """A list of sentences; `grave` ones are warnings."""

    kind: ClassVar[str] = "notes"
    items: tuple[str, ...]
    grave: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    numeric: bool = True
    help: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """`heat` in 0..1 shades it; None leaves it plain."""

    text: str
    heat: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the figure's own units, with its shape, its colour's number and its title."""

    x: float
    y: float
    shape: str
    colour: int
    title: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points in the figure's own units; `wide` stands out, `dashed` is a limit."""

    points: tuple[tuple[float, float], ...]
    colour: int
    title: str
    dashed: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    shape: str
    colour: int
    label: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot of lines and marks between axes; ticks are (position, label) in the figure's units."""

    kind: ClassVar[str] = "figure"
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]
    legend: tuple[Key, ...]
    note: str = ""
    lines: tuple[Line, ...] = ()


Block = Facts | Notes | Table | Figure


@dataclass(frozen=True, slots=True)
class Section:
    heading: str
    blocks: tuple[Block, ...]

"""The house rules, checked from the source itself."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cli", "core", "kernels", "recipes")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]

# From the ground up. Rooms on one floor never import each other; every import runs downhill.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"kernels", "core.errors", "core.progress", "core.libraries", "recipes"}),
    frozenset({"core.files"}),
    frozenset({"core.recipe", "core.formats", "core.hardware"}),
    frozenset({"core.reports"}),  # an artifact sums itself up in a report's words
    frozenset({"core.layers", "core.artifact", "core.text"}),
    frozenset({"core.models"}),
    frozenset({"core.runtime", "core.compression", "core.profiling", "core.training"}),
    frozenset(
        {
            "core.quantization",
            "core.pruning",
            "core.distillation",
            "core.conversion",
            "core.evaluation",
            "core.server",
            "core.bench",
        }
    ),
    frozenset({"cli"}),
)
FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Third parties that would make the light rooms heavy.
TORCH_FREE = (
    "core/errors.py",
    "core/progress.py",
    "core/files.py",
    "core/recipe",
    "core/hardware",
    "core/reports",
    "core/text",
    "core/models/config.py",
    "core/models/families.py",
    "core/models/rope.py",
    "core/models/shapes.py",
    "core/runtime/request.py",
    "core/runtime/grammar.py",
    "core/runtime/stats.py",
    "core/profiling/static.py",
    "core/profiling/shape.py",
    "core/profiling/predict.py",
    "core/profiling/profile.py",
    "core/profiling/plan.py",
    "core/profiling/measure.py",
    "cli",
)
HEAVY = {"torch", "transformers", "safetensors.torch", "triton"}


def room_of(name: str) -> str:
    """'infopt.core.artifact.read' -> 'core.artifact'."""
    parts = name.removeprefix("infopt.").split(".")
    return ".".join(parts[:2]) if parts[0] == "core" else parts[0]


def imported(path: Path, *, module_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def own_room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "core" else parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_downhill(path: Path) -> None:
    room = own_room(path)
    if path.name == "__init__.py" and room in ("core", "core.__init__"):
        return
    for name in imported(path):
        if not name.startswith("infopt."):
            continue
        other = room_of(name)
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {name}"
        assert not (room == "cli" and other == "kernels"), "cli never names kernels"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The signature is not counted: a verb's options are a table, not a body.
            assert node.end_lineno is not None
            assert node.end_lineno - node.body[0].lineno < 55, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packages_hold_a_docstring_only(path: Path) -> None:
    if path.name == "__init__.py":
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), "no barrels"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_screen_prints(path: Path) -> None:
    if path == ROOT / "cli" / "screen.py":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_light_rooms_import_nothing_heavy(path: Path) -> None:
    if relative(path).startswith(TORCH_FREE):
        found = {
            name
            for name in imported(path, module_level_only=True)
            if name.split(".")[0] in HEAVY or name in HEAVY
        }
        assert not found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_import_circles_within_a_room(path: Path) -> None:
    """A module never reaches itself through what it imports."""
    start = "infopt." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    seen: set[str] = set()
    todo = [name for name in imported(path) if name.startswith("infopt.")]
    while todo:
        name = todo.pop()
        assert name != start, "an import circle"
        file = ROOT / (name.removeprefix("infopt.").replace(".", "/") + ".py")
        if name not in seen and file.exists():
            seen.add(name)
            todo += [n for n in imported(file) if n.startswith("infopt.")]


def test_kernels_folder_never_shadows_the_kernels_distribution() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_shipped() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    found = {"infopt." + ".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES}
    assert found | {"infopt.kernels"} == listed, sorted(found ^ listed)


def test_every_room_has_its_floor() -> None:
    assert {own_room(p) for p in SOURCES} - {"core.__init__"} <= set(FLOOR_OF)


def test_tests_mirror_the_tree() -> None:
    """tests/core/x/test_y.py tests core/x/y.py (or a whole room: test_x.py)."""
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = test.parent.relative_to(ROOT / "tests")
        if folder == Path():
            continue
        assert (ROOT / folder).is_dir(), f"{test} mirrors nothing"

"""The library has an order: what a file imports stands before it, and nothing imports in a
circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import helpers
import pytest

ORDER = """errors ranking < cli storage data models device groups losses detection perturb
    < datasets poison triggers < metrics record < run < engine features
    < config consistency poison_search repair < poisoning joint settings < execution tables
    < exchange depth < report < bench < __main__ api < __init__"""
"""Folders and flat modules from the ground up. Neighbours know nothing of each other; within a
folder everything is allowed but a circle."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER.split("<")) for room in rooms.split()}


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, inside functions and for types,
    too; there `cli` alone may reach up."""
    files = {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        for node in tree.body if name == "cli" else ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                start = (
                    file.parents[node.level - 1].relative_to(package.parent).parts
                    if node.level
                    else ()
                )
                module = [*start, *(node.module or "").split(".")]
                paths = [
                    ".".join(filter(None, [*module, *end]))
                    for end in ([], *([alias.name] for alias in node.names))
                ]
            else:
                paths = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found[name] |= {
                path.removeprefix(f"{package.name}.")
                for path in paths
                if path.startswith(f"{package.name}.")
            } & files.keys() - {name}
    return found


def breaches(found: dict[str, set[str]]) -> list[str]:
    """Imports of what does not stand below."""
    pairs = [
        (name, other)
        for name in found
        for other in found[name]
        if name.split(".")[0] != other.split(".")[0]
    ]
    return sorted(
        f"{name} imports {other}"
        for name, other in pairs
        if FLOOR[name.split(".")[0]] <= FLOOR[other.split(".")[0]]
    )


def test_nothing_imports_what_stands_above_it_or_in_a_circle() -> None:
    found = imports(helpers.CHECKOUT / "backdoorlab")
    assert breaches(found) == [] and len(found) > 50
    TopologicalSorter(found).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("files", "broken", "circle"),
    [
        (
            {"run.py": "from .tables import rows", "tables/rows.py": "import json"},
            ["run imports tables.rows"],
            False,
        ),
        (
            {"run.py": "def f():\n    from made.tables.rows import x", "tables/rows.py": ""},
            ["run imports tables.rows"],
            False,
        ),
        ({"run.py": "", "cli.py": "from . import run"}, ["cli imports run"], False),
        ({"run.py": "", "cli.py": "def f():\n    from . import run"}, [], False),
        (
            {"tables/rows.py": "from ..execution import stage", "execution/stage.py": ""},
            ["tables.rows imports execution.stage"],
            False,
        ),
        (
            {
                "tables/rows.py": "from .groups import x",
                "tables/groups.py": "if TYPE_CHECKING:\n    from . import rows",
            },
            [],
            True,
        ),
        (
            {
                "tables/rows.py": "from .groups import x\nfrom .. import run",
                "tables/groups.py": "import made.run",
                "run.py": "",
            },
            [],
            False,
        ),
    ],
)
def test_a_breach_and_a_circle_are_seen(
    files: dict[str, str], broken: list[str], circle: bool, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(text)
    found = imports(tmp_path / "made")
    assert breaches(found) == broken
    try:
        TopologicalSorter(found).prepare()
    except CycleError:
        assert circle
    else:
        assert not circle

"""Rooms import only from rooms above them (design: one direction, no cycles)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moecollab

ROOT = Path(moecollab.__file__).parent
ORDER = [
    "",
    "models",
    "record",
    "patterns",
    "criteria",
    "pruning",
    "evaluation",
    "reporting",
    "demo",
    "cli",
]
PUBLIC_ONLY = {"demo", "cli"}
ALLOWED = {"moecollab.criteria", "moecollab.demo.demo", "moecollab.record.sums"}
LIGHT = {"torch", "transformers", "lm_eval", "plotly", "matplotlib", "polars", "datasets"}
DOORS = {
    "plotly": {"reporting"},
    "lm_eval": {"evaluation"},
    "transformers": {"models", "record", "pruning", "evaluation", "demo"},
    "typer": {"cli", "demo"},
}
FILES = sorted(p for p in ROOT.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    if path in (ROOT / "__init__.py", ROOT / "__main__.py"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "moecollab" or len(parts) == 1:
            continue
        there = parts[1] if parts[1] in ORDER else ""
        assert ORDER.index(there) <= ORDER.index(here), f"{path.name} imports {name}"
        if here in PUBLIC_ONLY and there not in ("", here):
            assert name in ALLOWED, f"{path.name}: {here} uses the public API only"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_door_for_each_dependency(path):
    for name in imports(path):
        door = DOORS.get(name.split(".")[0])
        assert door is None or room(path) in door, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("moecollab", LIGHT),
        ("moecollab.prune", LIGHT - {"torch", "transformers"}),
    ],
)
def test_imports_are_light(statement, heavy):
    code = f"import sys, moecollab; {statement}; print(*(m for m in sys.modules if '.' not in m))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(found.stdout.split())

"""The rooms of the package: the drawing of them, and what the checker of imports is told."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest

import threshnet_fast
from threshnet_fast.engines import select

ROOT = Path(__file__).resolve().parents[1]


def layers() -> list[set[str]]:
    """The rooms of each floor, the highest first."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^layers = \[\n(.*?)^\]", text, re.M | re.S)
    assert found is not None
    return [set(re.split(r" [:|] ", floor)) for floor in re.findall(r'"(.*?)"', found[1])]


def drawn() -> set[tuple[str, str]]:
    """The arrows of the drawing."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = re.search(r"```mermaid\nflowchart TD\n(.*?)```", text, re.S)
    assert found is not None
    arrows: set[tuple[str, str]] = set()
    for line in found[1].splitlines():
        groups = [part.strip().split(" & ") for part in line.split("-->")]
        for above, below in pairwise(groups):
            arrows |= set(product(above, below))
    return arrows


def test_the_drawing_has_every_floor_and_no_other_arrow():
    floors = layers()
    expected: set[tuple[str, str]] = set()
    for above, below in pairwise(floors):
        expected |= set(product(above, below))
    # The ground floor is drawn as the room of modules alone; what else is there are single files.
    expected = {(a, b) for a, b in expected if b not in floors[-1] or b == "nn"}
    assert drawn() == expected


def test_every_room_is_on_a_floor():
    package = Path(threshnet_fast.__file__).parent
    there = {path.stem for path in package.glob("[a-z]*.py")}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    named = set().union(*layers())
    assert there - {"kernels"} == named


def test_the_table_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## Rooms") : text.index("## The graph")]
    rooms = {room for room in set().union(*layers()) if room not in ("interruption", "version")}
    assert not {room for room in rooms if f"`{room}" not in table and f"/{room}" not in table}


# What is compared with the type of a device says so; its names are those of engines, too.
DEVICE_TYPE = re.compile(r"\.type\b|device")


def comparisons_with_engines(source: str) -> Iterator[str]:
    """The places where a name of an engine is compared with anything but the type of a device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject, *(case.pattern for case in node.cases)]
        else:
            continue
        # Of an expression, what is compared itself or within a tuple; of a pattern, all.
        parts = [each for side in sides for each in getattr(side, "elts", [side])]
        parts += [
            each for part in parts if isinstance(part, ast.pattern) for each in ast.walk(part)
        ]
        constants = {part.value for part in parts if isinstance(part, ast.Constant)}
        text = ast.unparse(node)
        if constants & set(select.names()) and not DEVICE_TYPE.search(text):
            yield f"line {node.lineno}: {text}"


def test_engines_are_compared_by_name_nowhere_else():
    package = Path(threshnet_fast.__file__).parent
    found = {
        f"{path.relative_to(package)}, {place}"
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "engines"
        for place in comparisons_with_engines(path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('backend == "cpu"', 1),
        ('"triton" != backend', 1),
        ('requested not in ("auto", "cpu")', 1),
        ('backends == ("reference",)', 1),
        ('match name:\n    case "cuda": pass', 1),
        ('x.device.type == "cuda"', 0),
        ('device_type in ("cpu", "cuda")', 0),
        ('run("cpu")', 0),
        ('find_spec("triton") is None', 0),
    ],
)
def test_comparisons_are_found(source, found):
    assert len(list(comparisons_with_engines(source))) == found


def test_variables_are_spelled_in_one_file():
    package = Path(threshnet_fast.__file__).parent
    places = [*package.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    spelled = {
        path.name
        for path in places
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"THRESHNET_FAST_[A-Z_]*", node.value)
    }
    assert spelled == {"environment.py"}

"""The rooms of the package: the drawing of them, and what the checker of imports is told."""

from __future__ import annotations

import re
from itertools import pairwise, product
from pathlib import Path

import threshnet_fast

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

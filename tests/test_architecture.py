"""docs/architecture.md against the code: who imports whom, and what the page says of DTensor and the configuration."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scale_digrap"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = {"config", "cli", "checkpoint_commands", "integrations"}
"""Single files of the package that the table speaks of."""

OPEN = {"runtime"} | {file.stem for file in PACKAGE.glob("*.py")} - ROWS
"""For all: errors, durations and other small files; the package itself is a version and names looked up in `optim`."""


@functools.cache
def imports() -> dict[str, set[str]]:
    """Room → modules of the package that a file of it imports, in functions too; not those for type checkers alone."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).parts
        room = parts[0] if len(parts) > 1 else file.stem
        tree = ast.parse(file.read_text())
        typing = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node not in typing:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import) and node not in typing:
                names = [alias.name for alias in node.names]
            found.setdefault(room, set()).update(names)
    return found


def rooms(names: set[str]) -> set[str]:
    made = set()
    for name in names:
        head, *rest = name.split(".")
        if head == "scale_digrap":
            place = rest[0] if rest else "__init__"
            exists = (PACKAGE / place).is_dir() or (PACKAGE / f"{place}.py").is_file()
            made.add(place if exists else "__init__" if place.startswith("__") else "optim")
    return made


def table() -> dict[str, set[str]]:
    rows = PAGE[PAGE.index("## Who imports whom") :].split("\n\n")[2].splitlines()[2:]
    allowed: dict[str, set[str]] = {}
    for row in rows:
        who, whom = row.strip("|").split("|")
        for room in re.findall(r"`(\w+)`", who):
            allowed[room] = {"*"} if whom.strip() == "all" else set(re.findall(r"`(\w+)`", whom))
    return allowed


def test_every_import_between_rooms_is_in_the_page():
    allowed = table()
    assert allowed["sharding"] == allowed["data"] == allowed["runtime"] == set()
    for room, names in imports().items():
        if room in OPEN - {"runtime"} | {"config"}:
            continue
        assert room in allowed, f"docs/architecture.md has no row for scale_digrap/{room}"
        more = rooms(names) - {room} - OPEN - allowed[room]
        assert allowed[room] == {"*"} or not more, (
            f"scale_digrap/{room} imports {sorted(more)}: see docs/architecture.md"
        )


def test_the_page_promises_no_import_that_there_is_not():
    found = imports()
    for room, allowed in table().items():
        assert allowed - {"*"} <= rooms(found[room]), f"docs/architecture.md: {room} imports less than its row says"


@pytest.mark.parametrize("room", ["optim", "data", "runtime", "sharding", "deepspeed"])
def test_lower_rooms_get_plain_values_and_methods_no_dtensor(room: str):
    names = imports()[room]
    assert "config" not in rooms(names)
    if room == "optim":
        assert not [n for n in names if n.startswith(("torch.distributed.tensor", "torch.distributed.fsdp"))]
        assert not [n for n in names if n.split(".")[0] == "deepspeed"]


def test_who_asks_for_dtensors():
    part = PAGE[PAGE.index("**`DTensor` is not") :].split("\n* ")[0]
    files = set()
    for room, names in re.findall(r"`(\w+)/\{?([^`}]+)\}?(?:\.py)?`", part):
        files |= {f"{room}/{name.removesuffix('.py')}" for name in names.split(",")}
    asking = re.compile(r"^\s*from torch.distributed.(tensor|fsdp) import", re.MULTILINE)
    found = {
        str(file.relative_to(PACKAGE).with_suffix(""))
        for file in PACKAGE.rglob("*.py")
        if "sharding" not in file.parts and asking.search(file.read_text())
    }
    assert found <= files

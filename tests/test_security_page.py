"""docs/security.md: every statement in its tables names a test, and the tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
HEAD = "| shown by |"


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_exists(file: str, name: str):
    assert name.startswith("test_")
    assert name in functions(file)


def test_every_row_names_a_test():
    tables = [block for block in PAGE.split("\n\n") if HEAD in block.splitlines()[0]]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(rows) >= 20
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row), row


def test_the_page_can_be_found():
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()
    assert "(docs/security.md)" in (ROOT / "SECURITY.md").read_text()
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
    for page in ("data", "checkpoints"):
        assert "(security.md" in (ROOT / "docs" / f"{page}.md").read_text()


def test_no_address_is_invented():
    assert "@" not in (ROOT / "SECURITY.md").read_text()

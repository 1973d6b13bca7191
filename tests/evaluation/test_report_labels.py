"""Labels are people's own words: text in every plot, table and page, whatever is in them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html import unescape

import pytest
from rich.console import Console

from scale_digrap.evaluation.report import write_report
from scale_digrap.evaluation.tables import csv_table, markdown_table, rich_differences, rich_table
from tests.evaluation.synthetic import comparison

LABELS = [
    r"$\foo{", "[/b]", "[bold red]x[/]", "<script>alert(1)</script>", "a | b", "lone \udce9 surrogate", "NUL \0 byte",
    "=1+1", "_hidden", "line\nbreak", "\x1b[31mred", "$x$", "`code` *em*", "long " * 60, "&amp;", '"quoted"', "-1",
    "@x",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_a_label_is_shown_as_text_everywhere(tmp_path, label):
    made = comparison(questions=20)
    methods = [dataclasses.replace(made.methods[0], label=label), *made.methods[1:]]
    suites = [dataclasses.replace(made.suites[0], title=label, description=label), *made.suites[1:]]
    found = dataclasses.replace(made, title=label, methods=methods, suites=suites)
    shown = found.methods[0].label
    assert len(shown) <= 100
    assert shown.isprintable()
    if label.isprintable() and len(label) <= 100:
        assert shown == label
    console = Console(file=io.StringIO(), width=400, force_terminal=False)
    console.print(rich_table(found, console))
    console.print(rich_differences(found))
    assert shown.split()[0] in console.file.getvalue()
    rows = list(csv.reader(io.StringIO(csv_table(found))))
    assert not any(cell[:1] in ("=", "+", "@") for row in rows for cell in row)
    assert rows[1][1] == (f"'{shown}" if shown[0] in "=+-@" else shown)
    table = [line for line in markdown_table(found).splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table[: 2 + len(methods)]}
    assert len(columns) == 1, table
    assert "<script>" not in "".join(table)


def test_a_report_of_such_labels_is_written(tmp_path):
    made = comparison(questions=20)
    for number, chunk in enumerate([LABELS[:6], LABELS[6:12], LABELS[12:]]):
        methods = [
            dataclasses.replace(one, label=label) for one, label in zip(made.methods, chunk, strict=False)
        ] + made.methods[len(chunk) :]
        suites = [dataclasses.replace(one, title=label) for one, label in zip(made.suites, chunk, strict=False)]
        found = dataclasses.replace(made, title=chunk[0], methods=methods, suites=suites)
        page = write_report(found, tmp_path / str(number)).read_text(encoding="utf-8")
        assert "<script>alert" not in page
        for method in found.methods:
            assert method.label in unescape(page)
        json.loads((tmp_path / str(number) / "results.json").read_text(encoding="utf-8"))

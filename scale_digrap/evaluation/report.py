"""Write a comparison down: results.json, table.md, PNG figures, and one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from scale_digrap.evaluation.plots import FIGURES, figures, to_png
from scale_digrap.evaluation.results import Comparison, write_atomically
from scale_digrap.evaluation.tables import (
    DIFFERENCES_NOTE,
    cell_text,
    differences,
    heading,
    markdown_table,
    notes,
    percent,
    question_text,
)

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --page: #ffffff; --dim: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --text: #f0f6fc; --page: #0d1117; --dim: #9198a1; }
}
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text);
       background: var(--page); max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); font-weight: 600; }
tr.group td { border-top: 2px solid var(--line); } tr.foot td { color: var(--dim); }
td.average, th.average { background: var(--soft); }
td.better { font-weight: 600; color: #1a7f37; } td.worse { font-weight: 600; color: #cf222e; }
.dim { color: var(--dim); } li { margin: .15rem 0; }
figure { margin: 1.2rem 0; padding: .8rem; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: #59636e; font-size: .85rem; margin-top: .5rem; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .82rem; }
"""


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write every file of the report, replacing those of an earlier one.

    Returns:
        The path of `report.html`. Beside it lie `results.json`, `table.md` and a PNG per figure.
    """
    folder = Path(folder)
    write_atomically(folder / "results.json", json.dumps(comparison.to_json(folder), indent=1, ensure_ascii=False))
    write_atomically(folder / "table.md", markdown_table(comparison))
    images = {name: to_png(figure) for name, figure in figures(comparison).items()}
    for old in (path for pattern in FIGURES for path in folder.glob(f"{pattern}.png")):
        if old.stem not in images:
            old.unlink()  # of a comparison with other methods
    for name, data in images.items():
        write_atomically(folder / f"{name}.png", data)
    write_atomically(folder / "report.html", html(comparison, images))
    return folder / "report.html"


def html(comparison: Comparison, images: Mapping[str, bytes]) -> str:
    """The report as one self-contained page."""
    title = escape(comparison.title or "Evaluation")
    commit = comparison.environment.get("commit")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        f'<p class="dim">{escape(_subtitle(comparison, commit))}</p>',
        '<div class="scroll">',
        _html_table(comparison),
        f'</div><p class="dim">{escape(" ".join(notes(comparison)))}</p>',
    ]
    if any(method.baseline for method in comparison.methods):
        parts.append(f'<h2>Paired differences</h2><div class="scroll">{_differences_table(comparison)}</div>')
        parts.append(f'<p class="dim">{escape(DIFFERENCES_NOTE)}</p>')
    parts.append("<h2>Suites</h2>")
    parts.append(_list(f"{suite.heading}: {suite.description or suite.shift}" for suite in comparison.suites))
    if images:
        parts.append("<h2>Figures</h2>")
    for name, data in images.items():
        source = base64.b64encode(data).decode()
        caption = escape(_caption(name, comparison))
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts.append("<h2>Training runs</h2>")
    parts.append(f'<div class="scroll">{_runs_table(comparison)}</div>')
    record = {"settings": comparison.settings, "environment": comparison.environment}
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(record, indent=1, ensure_ascii=False))}</pre>")
    return "\n".join([*parts, "</body></html>\n"])


def _subtitle(comparison: Comparison, commit: Any) -> str:
    seeds = comparison.seeds
    parts = [f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}: {', '.join(map(str, seeds)) or 'none'}"]
    if commit:
        parts.append(f"commit {commit}")
    if comparison.environment.get("machine"):
        parts.append(str(comparison.environment["machine"]))
    return " · ".join(parts)


def _html_table(comparison: Comparison) -> str:
    columns = comparison.columns
    marks = [' class="average"' if column.is_average else "" for column in columns]
    head = "".join(f"<th{mark}>{escape(heading(column))}</th>" for mark, column in zip(marks, columns, strict=True))
    rows, family = [], None
    for method in comparison.methods:
        group = ' class="group"' if family is not None and family != method.family else ""
        family = method.family
        cells = []
        for mark, column in zip(marks, columns, strict=True):
            cell = comparison.table[method.key][column.key]
            text = cell_text(cell)
            hint = ""
            if cell:
                hint = f' title="95 % over questions: {percent(cell.interval.low)} to {percent(cell.interval.high)}"'
            cells.append(f"<td{mark}{hint}>{f'<b>{text}</b>' if cell and cell.best else text}</td>")
        rows.append(f"<tr{group}><td>{escape(method.label)}</td>{''.join(cells)}</tr>")
    counts = "".join(
        f"<td{mark}>{question_text(comparison, column)}</td>" for mark, column in zip(marks, columns, strict=True)
    )
    rows.append(f'<tr class="group foot"><td>Questions</td>{counts}</tr>')
    return f"<table><thead><tr><th>Method</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _differences_table(comparison: Comparison) -> str:
    shown, rows = differences(comparison)
    head = "".join(f"<th>{escape(heading(column))}</th>" for column in shown)
    names = {1: "better", -1: "worse"}
    body = []
    for label, cells in rows:
        texts = [
            f'<td class="{names[cell.sign]}">{cell.text}</td>' if cell.sign else f"<td>{cell.text}</td>"
            for cell in cells
        ]
        body.append(f"<tr><td>{escape(label)}</td>{''.join(texts)}</tr>")
    return f"<table><thead><tr><th>Difference</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _runs_table(comparison: Comparison) -> str:
    labels = {method.key: method.label for method in comparison.methods}
    keys = list(dict.fromkeys(key for run in comparison.runs for key in run.training))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["Method", "seed", "train s", "evaluate s", *keys])
    rows = []
    for run in comparison.runs:
        values = [
            labels[run.method],
            run.seed,
            run.seconds.get("train"),
            run.seconds.get("evaluate"),
            *(run.training.get(key) for key in keys),
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(_figure(value))}</td>" for value in values) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _caption(name: str, comparison: Comparison) -> str:
    if name == "accuracy":
        spread = (
            "standard deviation over seeds" if len(comparison.seeds) > 1 else "95 % bootstrap intervals over questions"
        )
        return f"Score per suite and per average. Error bars: {spread}."
    if name.startswith("layers_"):
        return "What DiGraP did in each layer: ω (0 = AdamW, 1 = the whole conflicting part is removed) and conflicts."
    return "How far each layer went from its pre-trained value."


def _list(lines: Any) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"

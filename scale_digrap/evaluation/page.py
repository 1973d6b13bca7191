"""The report as one HTML page that needs nothing beside it: style, script and figures are in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from scale_digrap.evaluation.caveats import caveats, leaks, metrics
from scale_digrap.evaluation.results import Column, Comparison
from scale_digrap.evaluation.shift_accuracy import SPACES
from scale_digrap.evaluation.tables import (
    DIFFERENCES_NOTE,
    LEAKED,
    differences,
    figure_text,
    mark,
    notes,
    p_text,
    percent,
    question_text,
)

STYLE = """
:root { color-scheme: light dark; --line: #d5dbe1; --soft: #f4f6f8; --text: #1f2329; --page: #ffffff; --dim: #59636f;
        --good: #1a7f37; --bad: #cf222e; --serious: #fff1f0; --mild: #fff8e6; --edge-serious: #cf222e;
        --edge-mild: #bf8700; }
@media (prefers-color-scheme: dark) {
  :root { --line: #363d46; --soft: #161b22; --text: #e8edf2; --page: #0d1117; --dim: #98a2ad; --good: #4ac26b;
          --bad: #ff7b72; --serious: #2a1416; --mild: #272010; --edge-serious: #ff7b72; --edge-mild: #d29922; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text);
       background: var(--page); max-width: 1480px; margin: 0 auto; padding: 1.6rem 1.2rem 4rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.dim { color: var(--dim); font-size: .88rem; } .dim p, p.dim { margin: .35rem 0; max-width: 62rem; }
.caveats { list-style: none; margin: 1.1rem 0 1.4rem; padding: 0;
           max-width: 70rem; }
.caveats li { margin: .4rem 0; padding: .45rem .8rem; border-left: 3px solid var(--edge-mild); background: var(--mild);
              border-radius: 0 5px 5px 0; font-size: .9rem; overflow-wrap: anywhere; }
.caveats li.serious { border-color: var(--edge-serious); background: var(--serious); }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .38rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
         vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); z-index: 1; }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; }
thead th.sort { cursor: pointer; user-select: none; } thead th.sort:hover { color: var(--dim); }
thead th small, td small { display: block; font-weight: 400; color: var(--dim); font-size: .78rem; line-height: 1.3; }
tr.group td { border-top: 1px solid var(--dim); } tfoot td { color: var(--dim); }
td.average, th.average { background: var(--soft); }
td.incomplete { color: var(--dim); font-style: italic; }
td.better { color: var(--good); font-weight: 600; } td.worse { color: var(--bad); font-weight: 600; }
td.text { text-align: left; white-space: normal; min-width: 16rem; }
figure { margin: 1.3rem 0 1.8rem; }
figure .scroll > svg { display: block; width: 100%; min-width: min(620px, var(--width)); height: auto;
                       max-width: var(--width); }
figure svg text { font-family: "DejaVu Sans", Verdana, system-ui, sans-serif !important; }
figcaption { color: var(--dim); font-size: .86rem; margin-top: .3rem; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 640px) {
  body { padding: 1rem .8rem 3rem; }
  th:first-child, td:first-child { white-space: normal; max-width: 7.5rem; padding-left: 0; }
}
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .8rem; }
"""

# Sorting is what a static table cannot do; everything else here works without the script.
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("thead th").forEach(function (head, place) {
    head.classList.add("sort");
    head.tabIndex = 0;
    head.title = "Sort by this column";
    function sort() {
      var up = head.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var body = table.tBodies[0], rows = Array.from(body.rows);
      function value(row) { var v = row.cells[place].dataset.value; return v === undefined ? NaN : parseFloat(v); }
      rows.sort(function (a, b) {
        var x = value(a), y = value(b);
        if (isNaN(x) || isNaN(y)) { return isNaN(x) - isNaN(y) || a.dataset.place - b.dataset.place; }
        return up ? x - y : y - x;
      });
      if (place === 0) { rows.sort(function (a, b) { return (up ? -1 : 1) * (a.dataset.place - b.dataset.place); }); }
      rows.forEach(function (row) { row.classList.remove("group"); body.appendChild(row); });
    }
    head.addEventListener("click", sort);
    head.addEventListener("keydown", function (event) { if (event.key === "Enter") { sort(); } });
  });
});
"""


def html(comparison: Comparison, images: Mapping[str, str], correlations: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        comparison: what it is about.
        images: name → `<svg>` element, in the order in which they are shown.
        correlations: of `shift_accuracy.correlations`; empty without shift scores.
    """
    title = escape(comparison.title or "Evaluation")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        f'<p class="dim">{escape(_subtitle(comparison))}</p>',
        _caveats(comparison),
        "<h2>Results</h2>",
        _results(comparison),
        f'<div class="dim">{"".join(f"<p>{escape(note)}</p>" for note in notes(comparison))}</div>',
    ]
    columns, rows = differences(comparison)
    for kind, heading in (
        ("pair", "Between evaluations"),
        ("baseline", "Paired differences"),
        ("zero-shot", "Gap to the zero-shot model"),
    ):
        chosen = [row for row in rows if row.kind == kind]
        if chosen:
            parts += [f"<h2>{heading}</h2>", _differences(columns, chosen)]
    if rows:
        parts.append(f'<p class="dim">{escape(DIFFERENCES_NOTE)}</p>')
    if images:
        parts.append("<h2>Figures</h2>")
    layers = [name for name in images if name.startswith(("layers_", "drift_"))]
    parts += [_figure(name, images[name], comparison) for name in images if name not in layers]
    if layers:
        parts.append("<h2>Layers</h2>")
        parts += [
            f"<details><summary>{escape(_layer_title(name, comparison))}</summary>"
            f"{_figure(name, images[name], comparison)}</details>"
            for name in layers
        ]
    if comparison.leakage is not None:
        parts += ["<h2>Leakage</h2>", _leakage(comparison)]
    if correlations:
        parts += ["<h2>Shift scores</h2>", _shift(comparison), _correlations(comparison, correlations)]
    parts += ["<h2>Suites</h2>", _suites(comparison), "<h2>Runs</h2>", _runs(comparison)]
    record = {
        "settings": comparison.settings,
        "environment": comparison.environment,
        "provenance": {f"{run.method}, seed {run.seed}": run.provenance for run in comparison.runs},
    }
    text = escape(json.dumps(record, indent=1, ensure_ascii=False))
    parts.append(f"<details><summary>Settings, versions, checkpoints</summary><pre>{text}</pre></details>")
    return "\n".join([*parts, f"<script>{SCRIPT}</script></body></html>\n"])


def _subtitle(comparison: Comparison) -> str:
    seeds = comparison.seeds
    parts = [
        f"{_count(len(comparison.methods), 'method')}, {_count(len(comparison.suites), 'suite')}",
        _count(len(seeds), "seed"),
        f"scored by {', '.join(metrics(comparison)) or 'nothing yet'}",
    ]
    if comparison.environment.get("commit"):
        parts.append(f"commit {comparison.environment['commit']}")
    if comparison.environment.get("machine"):
        parts.append(str(comparison.environment["machine"]))
    return " · ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _caveats(comparison: Comparison) -> str:
    lines = [
        f"<li{' class=serious' if caveat.serious else ''}><b>{escape(caveat.title)}.</b> {escape(caveat.text)}</li>"
        for caveat in caveats(comparison)
    ]
    return f'<ul class="caveats">{"".join(lines)}</ul>' if lines else ""


def _results(comparison: Comparison) -> str:
    columns = comparison.columns
    head = "".join(
        f"<th{_average(column)}>{escape(column.heading)}{mark(comparison, column)}"
        f"<small>{f'mean of {len(column.suites)}' if column.is_average else _group(column)}</small></th>"
        for column in columns
    )
    body, family = [], None
    for place, method in enumerate(comparison.methods):
        group = ' class="group"' if family is not None and family != method.family else ""
        family = method.family
        cells = []
        for column in columns:
            cell = comparison.table[method.key][column.key]
            text = escape(figure_text(comparison, method.key, column))
            if cell is None:
                cells.append(f'<td class="incomplete{" average" if column.is_average else ""}">{text}</td>')
                continue
            low, high = percent(cell.interval.low), percent(cell.interval.high)
            bold = f"<b>{text}</b>" if cell.best else text
            cells.append(
                f'<td{_average(column)} data-value="{cell.mean:.6f}">{bold}<small>{low} to {high}</small></td>'
            )
        body.append(f'<tr{group} data-place="{place}"><td>{escape(method.label)}</td>{"".join(cells)}</tr>')
    counts = "".join(f"<td{_average(column)}>{question_text(comparison, column)}</td>" for column in columns)
    return _table(["Method"], head, body, f"<tr><td>Questions</td>{counts}</tr>", sortable=len(comparison.methods) > 2)


def _differences(columns: list[Column], rows: list[Any]) -> str:
    names = {1: "better", -1: "worse"}
    body = []
    for row in rows:
        cells = []
        for cell in row.cells:
            sign = f' class="{names[cell.sign]}"' if cell.sign else ""
            cells.append(f"<td{sign}>{escape(cell.text)}<small>{escape(cell.p)}</small></td>")
        body.append(f"<tr><td>{escape(row.label)}</td>{''.join(cells)}</tr>")
    return _table(["Difference", *(column.heading for column in columns)], "", body)


def _figure(name: str, image: str, comparison: Comparison) -> str:
    caption = escape(_caption(name, comparison))
    return f'<figure><div class="scroll">{image}</div><figcaption>{caption}</figcaption></figure>'


def _caption(name: str, comparison: Comparison) -> str:
    several = len(comparison.seeds) > 1
    spread = "standard deviation over seeds" if several else "95 % bootstrap intervals over questions"
    hatched = " Hatched: WiSE-FT mixtures." if any(method.variant_of for method in comparison.methods) else ""
    texts = {
        "accuracy": f"Score per suite. Error bars: {spread}.{hatched}",
        "groups": f"In distribution, near and far out of it. Error bars: {spread}.{hatched}",
        "id_ood": "In distribution against out of it, with 95 % bootstrap intervals. Up and right is better. Hollow: "
        "WiSE-FT mixtures, joined to the models that they lie between.",
        "wise": "WiSE-FT: α is the weight of the fine-tuned model. Bands: 95 % bootstrap intervals.",
        "shift": "How far each suite is from the training set, and how well it is answered. Three embeddings of "
        f"{(comparison.shift or {}).get('model') or 'the model'}, whose distances have different scales.",
        "layers": "What DiGraP did in each layer: ω (0 = AdamW, 1 = the whole conflicting part is removed) and how "
        "often gradient and drift were in conflict.",
        "drift": "How far each layer went from its pre-trained value.",
    }
    return next((text for start, text in texts.items() if name.startswith(start)), name)


def _layer_title(name: str, comparison: Comparison) -> str:
    kind, _, key = name.partition("_")
    if kind == "drift":
        return f"Drift per layer: {key}"
    return f"ω and conflicts per layer: {comparison.method(key).label}"


def _leakage(comparison: Comparison) -> str:
    assert comparison.leakage is not None
    rows = comparison.leakage["rows"]
    kinds = list(rows[0]["matches"]) if rows else []
    titles = {suite.name: suite.heading for suite in comparison.suites}
    body = []
    for row in rows:
        found = "worse" if row["marked"] else ""
        counts = "".join(f"<td>{row['matches'][kind]:,}</td>" for kind in kinds)
        name = escape(titles.get(row["suite"], row["suite"])) + (
            f" {LEAKED}" if row["suite"] in leaks(comparison) else ""
        )
        share = f'<td class="{found}">{row["leaked"]:,} ({100 * row["fraction"]:.1f} %)</td>'
        body.append(f"<tr><td>{name}</td><td>{row['questions']:,}</td>{counts}{share}</tr>")
    train = comparison.leakage.get("train", {})
    note = f"Compared with {train.get('questions', 0):,} training questions and {train.get('images', 0):,} images."
    names = {"question_id": "Question id", "question_and_image": "Question and image", "exact_image": "Same image"}
    names["near_image"] = "Similar image (not a leak)"
    return _table(["Suite", "Questions", *(names.get(kind, kind) for kind in kinds), "Leaked"], "", body) + (
        f'<p class="dim">{escape(note)}</p>'
    )


def _shift(comparison: Comparison) -> str:
    assert comparison.shift is not None
    titles = {suite.name: suite.heading for suite in comparison.suites}
    body = []
    for name, suite in comparison.shift["suites"].items():
        cells = []
        for space in SPACES:
            found = suite[space]
            text = "–" if found is None else f"{found['mean']:.2f}"
            spread = "" if found is None else f"{found['quantiles']['0.05']:.1f} to {found['quantiles']['0.95']:.1f}"
            cells.append(f"<td>{text}<small>{spread}</small></td>")
        body.append(
            f"<tr><td>{escape(titles.get(name, name))}</td>{''.join(cells)}<td>{suite['questions']:,}</td></tr>"
        )
    train, settings = comparison.shift["train"], comparison.shift["settings"]
    note = (
        f"Mean Mahalanobis distance to {train['samples']:,} of {train['questions']:,} training questions in the "
        f"embeddings of {comparison.shift['model'] or 'the model'}, with the 5th to 95th percentile. Embeddings: "
        f"{settings.get('embeddings', 'tokens')}; covariance: {settings['regularization']}."
    )
    return _table(["Suite", "Image", "Question", "Joint", "Questions"], "", body) + f'<p class="dim">{escape(note)}</p>'


def _correlations(comparison: Comparison, correlations: Mapping[str, Mapping[str, Any]]) -> str:
    body = []
    for key, spaces in correlations.items():
        for space, found in spaces.items():
            across = found["suites"]
            areas = [one["auroc"] for one in found["samples"].values() if one["auroc"] is not None]
            if across is None and not areas:
                continue
            cells = ["<td>–</td>"] * 2
            if across:
                cells = [
                    f"<td>{f'{across[name]:+.2f}'.replace('-', '−')}<small>{p_text(across[f'{name}_p'])}</small></td>"
                    for name in ("pearson", "spearman")
                ]
            area = f"{sum(areas) / len(areas):.3f}<small>{min(areas):.2f} to {max(areas):.2f}</small>" if areas else "–"
            label = escape(f"{comparison.method(key).label}, {space}")
            body.append(
                f"<tr><td>{label}</td>{''.join(cells)}<td>{across['n'] if across else '–'}</td><td>{area}</td></tr>"
            )
    note = (
        "Correlation over suites of mean distance and score; AUROC of the distance as a detector of wrong answers "
        "within a suite (0.5: tells nothing), mean and range over suites. Per suite: results.json."
    )
    head = ["Method, embedding", "Pearson", "Spearman", "Suites", "AUROC within suites"]
    return f"<details><summary>Correlation with accuracy</summary>{_table(head, '', body)}</details>" + (
        f'<p class="dim">{escape(note)}</p>'
    )


def _suites(comparison: Comparison) -> str:
    body = []
    for suite in comparison.suites:
        count = comparison.questions(suite.name)
        values = [suite.group, suite.shift, " ".join(metrics(comparison, suite.name)) or suite.metric]
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        number = "missing" if count is None else f"{count:,}"
        about = f'<td class="text">{escape(suite.description)}</td>'
        body.append(f"<tr><td>{escape(suite.heading)}</td>{cells}<td>{number}</td>{about}</tr>")
    return _table(["Suite", "Group", "Shift", "Scorer", "Questions", ""], "", body)


def _runs(comparison: Comparison) -> str:
    keys = list(dict.fromkeys(key for run in comparison.runs for key in run.training))
    body = []
    for run in comparison.runs:
        checkpoint = run.provenance.get("checkpoint")
        values = [run.seed, checkpoint, run.seconds.get("train"), run.seconds.get("evaluate")]
        cells = "".join(f"<td>{escape(_value(value))}</td>" for value in [*values, *map(run.training.get, keys)])
        body.append(f"<tr><td>{escape(comparison.method(run.method).label)}</td>{cells}</tr>")
    return _table(["Method", "Seed", "Checkpoint", "Train s", "Evaluate s", *keys], "", body)


def _table(head: Iterable[str], more: str, body: list[str], foot: str = "", *, sortable: bool = False) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head) + more
    kind = ' class="sortable"' if sortable else ""
    end = f"<tfoot>{foot}</tfoot>" if foot else ""
    inner = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody>{end}"
    return f'<div class="scroll"><table{kind}>{inner}</table></div>'


def _average(column: Column) -> str:
    return ' class="average"' if column.is_average else ""


def _group(column: Column) -> str:
    return {"id": "in distribution", "near": "near", "far": "far"}[column.group]


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

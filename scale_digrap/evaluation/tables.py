"""A comparison as text: tables for the terminal and in Markdown that say who wins, and where nobody does."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale_digrap.evaluation.caveats import caveats, leak_text, leakage_text, leaks, metrics
from scale_digrap.evaluation.results import Cell, Column, Comparison, Method
from scale_digrap.evaluation.statistics import Interval, Paired

EMPTY = "–"
"""Stands where a suite is missing."""
LEAKED = "†"
"""Marks suites of which the training data holds something."""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def cell_text(cell: Cell | None) -> str:
    """ "86.4 ± 0.5", "86.4" for one seed, "–" where incomplete; per cent."""
    if cell is None:
        return EMPTY
    return percent(cell.mean) + (f" ± {percent(cell.std)}" if cell.std is not None else "")


def interval_text(interval: Interval) -> str:
    """ "[85.9, 87.0]", per cent."""
    return f"[{percent(interval.low)}, {percent(interval.high)}]"


def figure_text(comparison: Comparison, method: str, column: Column) -> str:
    """`cell_text`, with "incomplete (5 of 6)" for an average that lacks suites."""
    cell = comparison.table[method][column.key]
    if cell is None and column.is_average:
        return f"incomplete ({comparison.present(method, column)} of {len(column.suites)})"
    return cell_text(cell)


def p_text(p: float) -> str:
    """ "p = 0.012", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def heading(column: Column) -> str:
    return f"{column.heading} (mean of {len(column.suites)})" if column.is_average else column.heading


def mark(comparison: Comparison, column: Column) -> str:
    """`LEAKED` for a suite that the training data holds something of, and for averages over such suites."""
    return LEAKED if set(column.suites) & set(leaks(comparison)) else ""


def question_text(comparison: Comparison, column: Column) -> str:
    """Number of questions under a suite's column."""
    counts = [comparison.questions(name) for name in column.suites]
    if any(count is None for count in counts):
        return EMPTY
    return f"{sum(count for count in counts if count is not None):,}".replace(",", " ")


def rich_table(comparison: Comparison, console: Console) -> Table:
    """The table for a terminal. Bold: the best of a column and everything the data do not tell apart from it.

    Where the terminal is too narrow for every suite, only ID, far and the averages are shown.
    """
    table = _rich_table(comparison, comparison.columns, narrow=False)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        table = _rich_table(comparison, summary_columns(comparison), narrow=True)
    return table


def _rich_table(comparison: Comparison, columns: list[Column], *, narrow: bool) -> Table:
    more = " Intervals, warnings" + (" and every suite" if narrow else "") + ": table.md and report.html."
    title = Text(comparison.title) if comparison.title else None
    table = Table(title=title, caption=Text(" ".join(notes(comparison)) + more), caption_justify="left")
    table.add_column("Method")
    for column in columns:
        style = "cyan" if column.is_average else None
        table.add_column(Text(column.heading + mark(comparison, column)), justify="right", style=style)
    family = None
    for method in comparison.methods:
        if family is not None and family != method.family:
            table.add_section()
        family = method.family
        texts = []
        for column in columns:
            # a terminal is narrow
            text = figure_text(comparison, method.key, column).replace(" ± ", "±").replace("incomplete ", "")
            cell = comparison.table[method.key][column.key]
            texts.append(f"[bold]{text}[/]" if cell and cell.best else text)
        table.add_row(Text(method.label), *texts)
    table.add_section()
    table.add_row("Questions", *(question_text(comparison, column) for column in columns), style="dim")
    return table


def markdown_table(comparison: Comparison) -> str:
    """Warnings, the table with intervals, its notes and the paired differences, in Markdown."""
    lines = [f"# {_plain(comparison.title)}", ""] if comparison.title else []
    lines += [f"> **{_plain(caveat.title)}.** {_plain(caveat.text)}  " for caveat in caveats(comparison)]
    shown = comparison.columns
    lines += ["", _row(["Method", *(_plain(heading(column)) + mark(comparison, column) for column in shown)])]
    lines.append(_row(["---", *("---:" for _ in shown)]))
    for method in comparison.methods:
        texts = []
        for column in shown:
            text, cell = figure_text(comparison, method.key, column), comparison.table[method.key][column.key]
            if cell:
                text = f"{f'**{text}**' if cell.best else text} {interval_text(cell.interval)}"
            texts.append(text)
        lines.append(_row([_plain(method.label), *texts]))
    lines.append(_row(["*Questions*", *(f"*{question_text(comparison, column)}*" for column in shown)]))
    lines += ["", *(f"{_plain(note)}  " for note in notes(comparison))]
    columns, rows = differences(comparison)
    if rows:
        lines += ["", _row(["Difference", *(_plain(column.heading) for column in columns)])]
        lines.append(_row(["---", *("---:" for _ in columns)]))
        for row in rows:
            texts = [f"**{cell.text}** ({cell.p})" if cell.sign else f"{cell.text} ({cell.p})" for cell in row.cells]
            lines.append(_row([_plain(row.label), *(text.replace(" ()", "") for text in texts)]))
        lines += ["", DIFFERENCES_NOTE]
    return "\n".join(lines).lstrip("\n") + "\n"


def csv_table(comparison: Comparison) -> str:
    """One line per method and column, as fractions in [0, 1]; empty where there is no figure."""
    buffer = io.StringIO()
    names = "method,label,seeds,column,heading,group,suites,present,mean,std,low,high,unit,questions,metric,leaked"
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names.split(","))
    found = leaks(comparison)
    for method in comparison.methods:
        for column in comparison.columns:
            cell = comparison.table[method.key][column.key]
            figures = ["", "", "", "", ""]
            if cell:
                low, high = cell.interval.low, cell.interval.high
                figures = [cell.mean, "" if cell.std is None else cell.std, low, high, cell.unit]  # type: ignore[list-item]
            counts = [comparison.questions(name) for name in column.suites]
            writer.writerow(
                [
                    method.key,
                    _csv_text(method.label),
                    len(comparison.runs_of(method.key)),
                    _csv_text(column.key),
                    _csv_text(column.heading),
                    column.group,
                    len(column.suites),
                    comparison.present(method.key, column),
                    *figures,
                    "" if None in counts else sum(count or 0 for count in counts),
                    " ".join(dict.fromkeys(name for suite in column.suites for name in metrics(comparison, suite))),
                    sum(found[name]["leaked"] for name in column.suites if name in found),
                ]
            )
    return buffer.getvalue()


def notes(comparison: Comparison) -> list[str]:
    """How to read the table."""
    trained = {method.key for method in comparison.methods if not method.seedless}
    seeds = sorted({run.seed for run in comparison.runs if run.method in trained})
    result = [f"Scores in %, by {', '.join(metrics(comparison)) or 'no scorer yet'}."]
    if len(seeds) > 1:
        result.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    elif seeds:
        result.append(f"One seed ({seeds[0]}): differences between seeds are not in these figures.")
    cells = [cell for row in comparison.table.values() for cell in row.values() if cell]
    images = any("image" in cell.unit for cell in cells)
    result.append(f"Intervals: 95 % bootstrap over questions{', by image where they share one' * images}.")
    if len(comparison.methods) > 1:
        result.append(
            "Bold: the best of its column and whatever a paired 95 % interval over questions"
            + (" and seeds" if len(seeds) > 1 else "")
            + " does not tell apart from it."
        )
    if comparison.leakage is not None:
        result.append(leakage_text(comparison.leakage))
    titles = {suite.name: suite.heading for suite in comparison.suites}
    result += [f"{LEAKED} {titles.get(name, name)}: {leak_text(row)}." for name, row in leaks(comparison).items()]
    incomplete = [
        method.label
        for method in comparison.methods
        if any(cell is None for cell in comparison.table[method.key].values())
    ]
    if incomplete:
        which = "every method" if len(incomplete) == len(comparison.methods) else ", ".join(incomplete)
        result.append(f"Incomplete, marked {EMPTY}: {which}.")
    return result


@dataclass(frozen=True)
class Difference:
    """One method against another in one column, in text."""

    text: str
    """ "+1.7 ± 1.0" in percentage points, "–" where incomplete."""
    p: str
    """ "p = 0.012", empty where there is no difference."""
    sign: int
    """1 better, −1 worse, 0 where the interval holds zero or there is none."""


@dataclass(frozen=True)
class DifferenceRow:
    """One method against another in every column that is shown."""

    label: str
    """ "DiGraP − AdamW"."""
    kind: str
    """What the other one is: "baseline", "zero-shot" or "pair"."""
    cells: list[Difference]


def differences(comparison: Comparison) -> tuple[list[Column], list[DifferenceRow]]:
    """Every method against its baseline and against the zero-shot model, and the pairs asked for, paired by question
    and seed.

    Returns:
        The columns (ID, groups of one suite, and averages) and the rows.
    """
    shown = summary_columns(comparison)
    rows = []
    for first, second in comparison.compared:
        method, other = comparison.method(first), comparison.method(second)
        kind = "pair" if (first, second) in comparison.pairs else "zero-shot" if other.seedless else "baseline"
        cells = [_difference(comparison.difference(first, second, column)) for column in shown]
        rows.append(DifferenceRow(_difference_label(method, other), kind, cells))
    return shown, rows


def _difference(paired: Paired | None) -> Difference:
    if paired is None:
        return Difference(EMPTY, "", 0)
    text = f"{signed_percent(paired.mean)} ± {percent(paired.half_width)}"
    return Difference(text, p_text(paired.p), paired.sign)


def _difference_label(method: Method, other: Method) -> str:
    if method.variant_of == other.key:  # "AdamW: + WiSE-FT" in place of "AdamW + WiSE-FT − AdamW"
        return f"{other.label}: {method.label.removeprefix(other.label).strip(' ,:')}"
    return f"{method.label} − {other.label}"


DIFFERENCES_NOTE = (
    "Paired differences in percentage points with 95 % intervals and two-sided p-values over the same questions and "
    "seeds; bold where p < 0.05, that is, where the interval does not hold zero. The p-values are not corrected for "
    "their number: of twenty true zeros, one is expected in bold."
)


def rich_differences(comparison: Comparison) -> Table:
    """`differences` for a terminal."""
    shown, rows = differences(comparison)
    table = Table(caption=DIFFERENCES_NOTE, caption_justify="left")
    table.add_column("Difference")
    for column in shown:
        table.add_column(Text(column.heading), justify="right")
    styles = {1: "bold green", -1: "bold red", 0: ""}
    for row in rows:
        table.add_row(Text(row.label), *(Text(c.text.replace(" ± ", "±"), style=styles[c.sign]) for c in row.cells))
    return table


def summary_columns(comparison: Comparison) -> list[Column]:
    """The columns of groups: averages, and suites that are alone in their group; ID, near, far, OOD, all."""
    return [
        column
        for column in comparison.columns
        if column.is_average
        or sum((c.group, c.benchmark) == (column.group, column.benchmark) for c in comparison.columns) == 1
    ]


_MARKUP = re.compile(r"[\\`*_\[\]<>|#~$]")


def _plain(text: str) -> str:
    """Text as Markdown shows it: no emphasis, link, HTML, formula or end of a cell in it."""
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), text.replace("\n", " "))


_ENTITIES = {"<": "&lt;", ">": "&gt;"}


def _csv_text(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

"""A comparison as text: tables for the terminal and in Markdown that say who wins, and where nobody does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale_digrap.evaluation.results import Cell, Column, Comparison
from scale_digrap.evaluation.suites import AVERAGES

EMPTY = "–"
"""Stands where a suite is missing, in its own column and in every average that it belongs to."""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def cell_text(cell: Cell | None) -> str:
    """ "86.4 ± 0.5", "86.4" for one seed, "–" where incomplete; per cent."""
    if cell is None:
        return EMPTY
    return percent(cell.mean) + (f" ± {percent(cell.std)}" if cell.std is not None else "")


def heading(column: Column) -> str:
    return f"{column.heading} (mean of {len(column.suites)})" if column.is_average else column.heading


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
    caption = " ".join(notes(comparison)) + (" Every suite: table.md and report.html." if narrow else "")
    table = Table(title=comparison.title or None, caption=caption, caption_justify="left")
    table.add_column("Method")
    for column in columns:
        table.add_column(column.heading, justify="right", style="cyan" if column.is_average else None)
    family = None
    for method in comparison.methods:
        if family is not None and family != method.family:
            table.add_section()
        family = method.family
        cells = [comparison.table[method.key][column.key] for column in columns]
        texts = [cell_text(cell).replace(" ± ", "±") for cell in cells]  # a terminal is narrow
        texts = [f"[bold]{text}[/]" if cell and cell.best else text for text, cell in zip(texts, cells, strict=True)]
        table.add_row(method.label, *texts)
    table.add_section()
    table.add_row("Questions", *(question_text(comparison, column) for column in columns), style="dim")
    return table


def markdown_table(comparison: Comparison) -> str:
    """The same table in Markdown, with its notes and the paired differences."""
    head = ["Method", *(heading(column) for column in comparison.columns)]
    lines = [_row(head), _row(["---", *("---:" for _ in comparison.columns)])]
    for method in comparison.methods:
        cells = [comparison.table[method.key][column.key] for column in comparison.columns]
        lines.append(
            _row(
                [method.label, *(f"**{cell_text(cell)}**" if cell and cell.best else cell_text(cell) for cell in cells)]
            )
        )
    lines.append(_row(["*Questions*", *(f"*{question_text(comparison, column)}*" for column in comparison.columns)]))
    lines += ["", *(f"{note}  " for note in notes(comparison))]
    shown, rows = differences(comparison)
    if rows:
        lines += ["", _row(["Difference", *(column.heading for column in shown)])]
        lines.append(_row(["---", *("---:" for _ in shown)]))
        lines += [
            _row([label, *(f"**{cell.text}**" if cell.sign else cell.text for cell in cells)]) for label, cells in rows
        ]
        lines += ["", DIFFERENCES_NOTE]
    return "\n".join(lines) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """How to read the table."""
    seeds = comparison.seeds
    result = ["VQA score in %."]
    if len(seeds) > 1:
        result.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    elif seeds:
        result.append(f"One seed ({seeds[0]}): differences between seeds are not in these figures.")
    result.append(
        "Bold: the best of its column and whatever a paired 95 % interval over questions"
        + (" and seeds" if len(seeds) > 1 else "")
        + " does not tell apart from it."
    )
    incomplete = [
        method.label
        for method in comparison.methods
        if any(cell is None for cell in comparison.table[method.key].values())
    ]
    if incomplete:
        result.append(f"Incomplete, marked {EMPTY}: {', '.join(incomplete)}.")
    return result


@dataclass(frozen=True)
class Difference:
    """One method against its baseline in one column, in text."""

    text: str
    """ "+1.7 ± 1.0" in percentage points, "–" where incomplete."""
    sign: int
    """1 better, −1 worse, 0 where the interval holds zero or there is none."""


def differences(comparison: Comparison) -> tuple[list[Column], list[tuple[str, list[Difference]]]]:
    """Every method with a baseline against it, paired by question and seed.

    Returns:
        The columns (ID, far and averages) and the rows, each a label such as "DiGraP − AdamW" and a cell per column.
    """
    labels = {method.key: method.label for method in comparison.methods}
    shown = summary_columns(comparison)
    rows = []
    for method in comparison.methods:
        if method.baseline is None:
            continue
        cells = []
        for column in shown:
            difference = comparison.difference(method.key, method.baseline, column)
            if difference is None:
                cells.append(Difference(EMPTY, 0))
                continue
            text = f"{signed_percent(difference.mean)} ± {percent(difference.half_width)}"
            cells.append(Difference(text, difference.sign))
        if method.variant_of == method.baseline:  # "AdamW: + WiSE-FT" in place of "AdamW + WiSE-FT − AdamW"
            base = labels[method.baseline]
            label = f"{base}: {method.label.removeprefix(base).strip()}"
        else:
            label = f"{method.label} − {labels[method.baseline]}"
        rows.append((label, cells))
    return shown, rows


DIFFERENCES_NOTE = (
    "Paired differences in percentage points with 95 % intervals over the same questions and seeds; bold where the "
    "interval does not hold zero."
)


def rich_differences(comparison: Comparison) -> Table:
    """`differences` for a terminal."""
    shown, rows = differences(comparison)
    table = Table(caption=DIFFERENCES_NOTE, caption_justify="left")
    table.add_column("Difference")
    for column in shown:
        table.add_column(column.heading, justify="right")
    styles = {1: "bold green", -1: "bold red", 0: ""}
    for label, cells in rows:
        table.add_row(label, *(Text(cell.text.replace(" ± ", "±"), style=styles[cell.sign]) for cell in cells))
    return table


def summary_columns(comparison: Comparison) -> list[Column]:
    """The columns of groups, ID first: averages, and suites that are alone in their group."""
    groups = {suite.name: suite.group for suite in comparison.suites}
    shown = {}
    for column in comparison.columns:
        if column.is_average or list(groups.values()).count(groups[column.key]) == 1:
            shown[column.key if column.is_average else groups[column.key]] = column
    return [shown[name] for name in ("id", *AVERAGES) if name in shown]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

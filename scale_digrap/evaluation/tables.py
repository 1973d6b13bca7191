"""A comparison as text: a table for the terminal, one in Markdown, and sentences that say who wins and who does not."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from scale_digrap.evaluation.results import Cell, Column, Comparison

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
        summary = [
            column for column in comparison.columns if column.is_average or _only_of_its_group(comparison, column)
        ]
        table = _rich_table(comparison, summary, narrow=True)
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
    """The same table in Markdown, with its notes."""
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
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(comparison))]) + "\n"


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


def verdicts(comparison: Comparison) -> list[str]:
    """For each method with a baseline: what the paired comparison says in the ID and OOD columns."""
    labels = {method.key: method.label for method in comparison.methods}
    shown = [column for column in comparison.columns if column.is_average or _only_of_its_group(comparison, column)]
    lines = []
    for method in comparison.methods:
        if method.baseline is None:
            continue
        parts = []
        for column in shown:
            difference = comparison.difference(method.key, method.baseline, column)
            if difference is None:
                parts.append(f"{column.heading} {EMPTY}")
                continue
            mean, half = difference
            mark = "" if abs(mean) <= half else (" (better)" if mean > 0 else " (worse)")
            parts.append(f"{column.heading} {signed_percent(mean)} ± {percent(half)}{mark}")
        lines.append(f"{method.label} − {labels[method.baseline]}: {', '.join(parts)}")
    return lines


def _only_of_its_group(comparison: Comparison, column: Column) -> bool:
    (name,) = column.suites
    group = next(suite.group for suite in comparison.suites if suite.name == name)
    return sum(suite.group == group for suite in comparison.suites) == 1


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

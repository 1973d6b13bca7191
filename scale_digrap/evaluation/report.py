"""Write a comparison down: results.json, tables in Markdown and CSV, PNG figures, and one HTML page."""

from __future__ import annotations

from pathlib import Path

from scale_digrap.evaluation.figures import to_png, to_svg
from scale_digrap.evaluation.page import html
from scale_digrap.evaluation.plots import FIGURES, figures
from scale_digrap.evaluation.results import Comparison, write_atomically
from scale_digrap.evaluation.shift_accuracy import correlations
from scale_digrap.evaluation.tables import csv_table, markdown_table
from scale_digrap.runtime.text import finite, write_json


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write every file of the report, replacing those of an earlier one.

    Returns:
        The path of `report.html`. Beside it lie `results.json`, `table.md`, `table.csv` and a PNG per figure.

    Raises:
        ResultsError: results that cannot stand in one table, or shift scores whose files are not there.
    """
    folder = Path(folder)
    found = correlations(comparison, comparison.folder or folder)
    drawn = figures(comparison)
    page = html(comparison, {name: to_svg(figure, name) for name, figure in drawn.items()}, found)
    images = {name: to_png(figure) for name, figure in drawn.items()}
    results = {**comparison.to_json(folder), "shift_correlations": found}
    # Nothing is written before everything is made: an error leaves the earlier report whole.
    write_atomically(folder / "results.json", write_json(finite(results), indent=1, ensure_ascii=False))
    write_atomically(folder / "table.md", markdown_table(comparison))
    write_atomically(folder / "table.csv", csv_table(comparison))
    for old in (path for pattern in FIGURES for path in folder.glob(f"{pattern}.png")):
        if old.stem not in images:
            old.unlink()  # of a comparison with other methods
    for name, data in images.items():
        write_atomically(folder / f"{name}.png", data)
    write_atomically(folder / "report.html", page)
    return folder / "report.html"

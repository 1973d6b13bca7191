"""`scale-digrap report RUN [RUN …]`: evaluations that are there already, one beside the other. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.evaluation.caveats import caveats
from scale_digrap.evaluation.results import Comparison, ResultsError
from scale_digrap.evaluation.suites import Suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scale-digrap report`."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path,
        help="folder of an evaluation or of a quick-start, with its results.json",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR",
        help="where to write the report (default: RUN itself for one, runs/comparison for several)",
    )  # fmt: skip
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Read, compare, write, and print the tables."""
    from rich.console import Console

    from scale_digrap.evaluation.report import write_report
    from scale_digrap.evaluation.tables import rich_differences, rich_table

    comparison = load(arguments.runs)
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path("runs/comparison"))
    page = write_report(comparison, out)
    console = Console()
    for caveat in caveats(comparison):
        style = "bold red" if caveat.serious else "yellow"
        console.print(f"{caveat.title}. ", style=style, markup=False, highlight=False, end="")
        console.print(caveat.text, markup=False, highlight=False)
    console.print()
    console.print(rich_table(comparison, console))
    console.print(rich_differences(comparison))
    console.print(f"\n{page}", style="bold", markup=False, highlight=False, soft_wrap=True)
    return 0


def load(folders: Sequence[str | Path]) -> Comparison:
    """One evaluation, or several in one table.

    Raises:
        ResultsError: see `Comparison.load` and `merge`; a folder named twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    twice = [str(path) for path in paths if paths.count(path) > 1]
    if twice:
        raise ResultsError(f"{twice[0]} is named twice: an evaluation cannot be compared with itself")
    found = [Comparison.load(path) for path in paths]
    return found[0] if len(found) == 1 else merge(found, _names(paths))


def merge(comparisons: Sequence[Comparison], names: Sequence[str]) -> Comparison:
    """Put evaluations side by side: every method of each is a row, the suites of all are the columns.

    Rows of the same method are compared with that of the first evaluation; where no method is in both, the fine-tuned
    ones of the others with each of the first. What is not alike (prompts, scorers, generation) becomes a caveat.

    Args:
        comparisons: at least two, without leftovers of an earlier merge.
        names: of the evaluations, all different.

    Raises:
        ResultsError: a suite means different things in two of them, or has different questions in number.
    """
    suites: dict[str, Suite] = {}
    origin: dict[str, str] = {}
    methods, runs, pairs = [], [], []
    for comparison, name in zip(comparisons, names, strict=True):
        for suite in comparison.suites:
            known = suites.get(suite.name)
            if known is None or (known.missing and not suite.missing and _alike(known, suite)):
                suites[suite.name], origin[suite.name] = suite, name
            elif not _alike(known, suite):
                raise ResultsError(
                    f"suite {suite.name!r} is {_tags(known)} in {origin[suite.name]} and {_tags(suite)} in {name}: the "
                    "results cannot stand in one table. Report them apart"
                )
        for method in comparison.methods:
            renamed = {
                field: None if value is None else f"{name}:{value}"
                for field in ("key", "baseline", "variant_of")
                for value in [getattr(method, field)]
            }
            methods.append(
                dataclasses.replace(method, **renamed, label=f"{method.label} ({name})", source=name)  # type: ignore[arg-type]
            )
        runs += [dataclasses.replace(run, method=f"{name}:{run.method}") for run in comparison.runs]
        pairs += [(f"{name}:{first}", f"{name}:{second}") for first, second in comparison.pairs]
    first, start = comparisons[0], names[0]
    for comparison, name in zip(comparisons[1:], names[1:], strict=True):
        here = [method.key for method in comparison.methods]
        common = [method.key for method in first.methods if method.key in here]
        trained = [key for key in common if not first.method(key).seedless]
        if trained:
            pairs += [(f"{name}:{key}", f"{start}:{key}") for key in common]
        else:
            pairs += [
                (f"{name}:{ours.key}", f"{start}:{theirs.key}")
                for ours in comparison.methods
                for theirs in first.methods
                if not (ours.seedless or theirs.seedless or ours.variant_of or theirs.variant_of)
            ]
    return Comparison(
        methods=methods,
        suites=list(suites.values()),
        runs=runs,
        settings={name: comparison.settings for comparison, name in zip(comparisons, names, strict=True)},
        environment={
            "evaluations": {name: comparison.environment for comparison, name in zip(comparisons, names, strict=True)}
        },
        title=f"Comparison of {', '.join(names)}",
        leakage=_leakage(comparisons),
        shift=_shift(comparisons, names),
        pairs=pairs,
    )


def _leakage(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """The worst that any of the evaluations has found, per suite."""
    reports = [comparison.leakage for comparison in comparisons if comparison.leakage is not None]
    if not reports:
        return None
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for report in reports for row in report["rows"]):
        known = rows.get(row["suite"])
        if known is None or (row["marked"], row["leaked"]) > (known["marked"], known["leaked"]):
            rows[row["suite"]] = row
    missing = sorted({name for report in reports for name in report.get("missing", []) if name not in rows})
    return {**reports[0], "rows": list(rows.values()), "missing": missing}


def _shift(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict[str, Any] | None:
    """The first evaluation's shift scores that there are: distances in different models' embeddings have nothing in
    common, so only one model's can be shown."""
    for comparison, name in zip(comparisons, names, strict=True):
        if comparison.shift is not None and comparison.folder is not None:
            suites = {
                suite: {**found, "file": str(comparison.folder / found["file"])}
                for suite, found in comparison.shift["suites"].items()
            }
            return {**comparison.shift, "model": f"{comparison.shift['model']} ({name})", "suites": suites}
    return None


def _alike(a: Suite, b: Suite) -> bool:
    return _tags(a) == _tags(b)


def _tags(suite: Suite) -> str:
    return f"{suite.group}/{suite.shift}" + (f" of {suite.benchmark}" if suite.benchmark else "")


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [os.sep.join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]

"""Figures of a comparison, drawn without a display."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scale_digrap.evaluation.caveats import metrics
from scale_digrap.evaluation.figures import (
    INK,
    MUTED,
    STYLE,
    error_bars,
    legend,
    markers,
    method_colours,
    padded,
    plot_label,
)
from scale_digrap.evaluation.layer_plots import drift, layers_over_time
from scale_digrap.evaluation.results import Column, Comparison, Method
from scale_digrap.evaluation.shift_accuracy import SPACES, suite_points
from scale_digrap.evaluation.statistics import correlate
from scale_digrap.evaluation.tables import p_text, summary_columns

FIGURES = ("accuracy", "groups", "id_ood*", "wise*", "shift", "layers_*", "drift_*")
"""Name patterns of what `figures` draws."""


def figures(comparison: Comparison) -> dict[str, Figure]:
    """Every figure that the comparison has data for, by file name without its ending."""
    drawn = {}
    for benchmark in dict.fromkeys(column.benchmark for column in comparison.columns):
        columns = [column for column in summary_columns(comparison) if column.benchmark == benchmark]
        suffix = f"_{benchmark}" if len({column.benchmark for column in comparison.columns}) > 1 else ""
        scatter = id_against_ood(comparison, columns)
        if scatter is not None:
            drawn[f"id_ood{suffix}"] = scatter
        curve = wise_curve(comparison, columns)
        if curve is not None:
            drawn[f"wise{suffix}"] = curve
    if any(column.is_average for column in comparison.columns):
        there = [c for c in summary_columns(comparison) if any(row[c.key] for row in comparison.table.values())]
        if there:
            drawn["groups"] = accuracy(comparison, there, "In distribution, near and far")
    drawn["accuracy"] = accuracy(comparison, [c for c in comparison.columns if not c.is_average], "Suites")
    if comparison.shift is not None:
        distance = shift_against_accuracy(comparison)
        if distance is not None:
            drawn["shift"] = distance
    for method in comparison.methods:
        runs = [run for run in comparison.runs_of(method.key) if run.telemetry]
        if runs:
            drawn[f"layers_{method.key}"] = layers_over_time(method, runs[0])
    by_family: dict[str, list[Method]] = {}
    for method in comparison.methods:
        runs = comparison.runs_of(method.key)
        if any(layer["drift"] is not None for run in runs for layer in run.drift.values()):
            by_family.setdefault(method.family, []).append(method)
    for family, methods in by_family.items():
        drawn[f"drift_{family}"] = drift(comparison, methods)
    return drawn


_BARS_PER_ROW = 48


def accuracy(comparison: Comparison, columns: list[Column], title: str) -> Figure:
    """Bars per column, one per method; error bars: ± std over seeds, or 95 % over questions."""
    per_row = max(1, _BARS_PER_ROW // max(1, len(comparison.methods)))
    panels = [columns[start : start + per_row] for start in range(0, len(columns), per_row)]
    colours = method_colours(comparison.methods)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1 * len(panels) + 0.8), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(panels), 1))
        for axis, members in zip(axes, panels, strict=True):
            width = 0.84 / len(comparison.methods)
            crowded = len(members) * len(comparison.methods) > 30
            for index, method in enumerate(comparison.methods):
                offset = (index - (len(comparison.methods) - 1) / 2) * width
                for place, column in enumerate(members):
                    cell = comparison.table[method.key][column.key]
                    if cell is None:
                        axis.text(place + offset, 1, "–", ha="center", va="bottom", fontsize=7)
                        continue
                    height, error = 100 * cell.mean, error_bars(cell)
                    variant = method.variant_of is not None
                    axis.bar(
                        place + offset,
                        height,
                        0.9 * width,
                        color="none" if variant else colours[method.key],
                        edgecolor=colours[method.key],
                        hatch="/////" if variant else None,
                        linewidth=0.8,
                        yerr=error,
                        error_kw={"elinewidth": 0.9, "ecolor": INK, "capsize": 1.5},
                    )
                    axis.text(
                        place + offset,
                        height + error[1][0] + 1.5,
                        f"{height:.0f}",
                        ha="center",
                        va="bottom",
                        rotation=90 if crowded else 0,
                        fontsize=6.5,
                        color=MUTED,
                    )
            axis.set_xticks(range(len(members)), [_bar_label(comparison, column) for column in members])
            axis.tick_params(axis="x", length=0)
            axis.set_xlim(-0.55, max(len(members), 2 if len(panels) > 1 else 1) - 0.45)
            axis.set_ylim(0, 112)
            axis.set_yticks(range(0, 101, 20))
            axis.grid(axis="y")
            axis.set_ylabel(_score_label(comparison))
        axes[0].set_title(title)
        handles = [
            Patch(
                facecolor="none" if method.variant_of else colours[method.key],
                edgecolor=colours[method.key],
                hatch="/////" if method.variant_of else None,
                linewidth=0.8,
            )
            for method in comparison.methods
        ]
        labels = [method.label for method in comparison.methods]
        legend(figure, handles, labels)
    return figure


def id_against_ood(comparison: Comparison, columns: list[Column]) -> Figure | None:
    """Score in distribution against each group out of it, a point per method with 95 % intervals both ways. WiSE-FT
    mixtures are joined to the two models that they lie between. None without figures for both axes or
    for a single method."""
    across = next((column for column in columns if column.group == "id"), None)
    panels = [column for column in columns if column.group in ("near", "far", "ood") and across is not None]
    table = comparison.table
    panels = [
        column
        for column in panels
        if any(row[column.key] and row[across.key] for row in table.values())  # type: ignore[union-attr]
    ]
    if across is None or not panels or len(comparison.methods) < 2:
        return None
    colours, marks = method_colours(comparison.methods), markers(comparison.methods)
    with rc_context(STYLE):
        figure = Figure(figsize=(11 if len(panels) > 1 else 6.5, 4.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        handles: dict[str, Any] = {}
        for axis, column in zip(axes, panels, strict=True):
            cells = {key: (row[across.key], row[column.key]) for key, row in table.items()}
            xs, ys = [], []
            for chain in _chains(comparison):
                points = [(100 * a.mean, 100 * b.mean) for a, b in (cells[method.key] for method in chain) if a and b]
                if len(points) > 1:
                    axis.plot(
                        *zip(*points, strict=True), color=colours[chain[-1].key], linewidth=1, alpha=0.6, zorder=1
                    )
            for method in comparison.methods:
                a, b = cells[method.key]
                if a is None or b is None:
                    continue
                x, y = 100 * a.mean, 100 * b.mean
                xs += [100 * a.interval.low, 100 * a.interval.high, x]
                ys += [100 * b.interval.low, 100 * b.interval.high, y]
                error = {
                    f"{name}err": [
                        [max(0.0, 100 * (cell.mean - cell.interval.low))],
                        [max(0.0, 100 * (cell.interval.high - cell.mean))],
                    ]
                    for name, cell in (("x", a), ("y", b))
                }
                handles[plot_label(method.label)] = axis.errorbar(
                    x, y, **error, fmt=marks[method.key], markersize=7, color=colours[method.key], elinewidth=1,
                    markerfacecolor="none" if method.variant_of else colours[method.key], markeredgewidth=1.3, zorder=2,
                )  # fmt: skip
            axis.set_xlim(*padded(xs))
            axis.set_ylim(*padded(ys))
            axis.grid()
            axis.set_xlabel(f"{across.heading}, {_score_label(comparison)}")
            axis.set_ylabel(f"{_title(column)} (%)")
            axis.set_title(f"{_title(column)} against {across.heading}")
        legend(figure, handles.values(), list(handles))
    return figure


def wise_curve(comparison: Comparison, columns: list[Column]) -> Figure | None:
    """Score against the weight α of the fine-tuned model, a panel per trained method, a line per group with the band of
    its 95 % intervals. None where no method has mixtures."""
    chains = [chain for chain in _chains(comparison) if len(chain) > 2]
    shown = [column for column in columns if column.group in ("id", "near", "far")]
    if not chains or not shown:
        return None
    colours = {"id": MUTED, "near": "#2f7ebc", "far": "#d9722a"}
    with rc_context(STYLE):
        per_row = min(4, len(chains))
        rows = -(-len(chains) // per_row)
        figure = Figure(figsize=(max(5.5, 2.75 * per_row), 2.9 * rows + 0.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, per_row, sharey=True, squeeze=False).ravel())
        for axis in axes[len(chains) :]:
            axis.remove()
        for axis, chain in zip(axes, chains, strict=False):
            for column in shown:
                points = [
                    (alpha, cell)
                    for method in chain
                    for alpha, cell in [(comparison.alpha(method), comparison.table[method.key][column.key])]
                    if cell is not None and alpha is not None
                ]
                if not points:
                    continue
                alphas = [alpha for alpha, _ in points]
                axis.fill_between(
                    alphas,
                    [100 * cell.interval.low for _, cell in points],
                    [100 * cell.interval.high for _, cell in points],
                    color=colours[column.group],
                    alpha=0.18,
                    linewidth=0,
                )
                axis.plot(
                    alphas, [100 * cell.mean for _, cell in points], color=colours[column.group], marker="o",
                    markersize=4, label=plot_label(_title(column)),
                )  # fmt: skip
            axis.grid()
            axis.set_xlim(-0.04, 1.04)
            axis.set_title(chain[-1].label)
            axis.set_xlabel("α (0 pre-trained, 1 fine-tuned)")
        axes[0].set_ylabel(_score_label(comparison))
        handles, labels = axes[0].get_legend_handles_labels()
        legend(figure, handles, labels)
    return figure


def shift_against_accuracy(comparison: Comparison) -> Figure | None:
    """Mean Mahalanobis distance of each suite to the training set against its score, a panel per embedding, a mark per
    method. None where no suite has both."""
    methods = [method for method in comparison.methods if method.variant_of is None]
    colours, marks = method_colours(comparison.methods), markers(comparison.methods)
    spaces = [space for space in SPACES if any(suite_points(comparison, m.key, space) for m in methods)]
    if not spaces:
        return None
    titles = {suite.name: suite.heading for suite in comparison.suites}
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.5, 3.7 * len(spaces)), 4.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(spaces), sharey=True))
        for axis, space in zip(axes, spaces, strict=True):
            highest: dict[str, tuple[float, float]] = {}
            for method in methods:
                points = suite_points(comparison, method.key, space)
                if not points:
                    continue
                xs, ys = [x for _, x, _ in points], [100 * y for _, _, y in points]
                axis.plot(
                    xs,
                    ys,
                    marks[method.key],
                    color=colours[method.key],
                    markersize=6,
                    label=plot_label(method.label),
                    linestyle="none",
                )
                for (name, x, _), y in zip(points, ys, strict=True):
                    if name not in highest or y > highest[name][1]:
                        highest[name] = (x, y)
            _label_points(axis, {titles.get(name, name): place for name, place in highest.items()})
            shown = next((m for m in methods if not m.seedless), methods[0])
            points = suite_points(comparison, shown.key, space)
            found = correlate([x for _, x, _ in points], [y for _, _, y in points])
            axis.set_title(f"{space.capitalize()} embedding")
            if found:
                r = f"{found.pearson:+.2f}".replace("-", "−")
                text = f"{shown.label}: r = {r} ({p_text(found.pearson_p)}), {found.n} suites"
                axis.text(0.02, 0.02, text, transform=axis.transAxes, fontsize=7.5, color=MUTED)
            axis.grid()
            axis.set_xlabel("Mahalanobis distance to the training set")
        axes[0].set_ylabel(_score_label(comparison))
        handles, labels = axes[0].get_legend_handles_labels()
        legend(figure, handles, labels)
    return figure


def _label_points(axis: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Names above points, higher where another name is in the way."""
    axis.margins(x=0.14, y=0.14)
    axis.autoscale_view()
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    points = {name: ((x - left) / (right - left), (y - low) / (high - low)) for name, (x, y) in places.items()}
    # what is in the way: centre, half width and how near it may come
    taken = [(across, up, 0.015, 0.022) for across, up in points.values()]
    for name, (across, point) in sorted(points.items(), key=lambda item: item[1][1]):
        up, half = point + 0.025, 0.012 * len(name)
        while any(
            abs(across - x) < half + wide and abs(up + 0.01 - y) < near for x, y, wide, near in taken if y != point
        ):
            up += 0.01
        taken.append((across, up + 0.01, half, 0.035))
        axis.text(across, up, name, transform=axis.transAxes, ha="center", fontsize=7, color=MUTED)


def _chains(comparison: Comparison) -> list[list[Method]]:
    """Per trained method: the zero-shot model, its mixtures by α, and itself."""
    chains = []
    for method in comparison.methods:
        if method.seedless or method.variant_of is not None:
            continue
        mixtures = [other for other in comparison.methods if other.variant_of == method.key]
        mixtures = [other for other in mixtures if comparison.alpha(other) is not None]
        mixtures.sort(key=lambda other: comparison.alpha(other) or 0.0)
        base = comparison.zero_shot(method)
        chains.append([*([base] if base else []), *mixtures, method])
    return chains


def _title(column: Column) -> str:
    heading = plot_label(column.heading)
    return f"{heading}, mean of {len(column.suites)}" if column.is_average else heading


def _score_label(comparison: Comparison) -> str:
    return f"{'/'.join(metrics(comparison))} (%)"


def _bar_label(comparison: Comparison, column: Column) -> str:
    if column.is_average:
        return f"{plot_label(column.heading)}\nmean of {len(column.suites)}"
    count = comparison.questions(column.suites[0])
    return f"{plot_label(column.heading)}\n" + (f"n = {count:,}" if count is not None else "missing")

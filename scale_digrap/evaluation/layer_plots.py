"""Figures of single layers: what the method did in them, and how far they went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from scale_digrap.evaluation.figures import HUES, STYLE, legend, plot_label
from scale_digrap.evaluation.results import Comparison, Method, MethodRun, finite

_MATRIX_LIMIT = 60
"""Rows of a layer figure up to which every row is labelled."""


def layers_over_time(method: Method, run: MethodRun) -> Figure:
    """Projection strength ω and conflict rate per layer (rows) over the steps (columns) of one run."""
    steps = [int(line["step"]) for line in run.telemetry]
    names, hidden = _shown(list(run.telemetry[-1]["layers"]))
    values = {
        quantity: np.array([[_number(line["layers"].get(name), quantity) for line in run.telemetry] for name in names])
        for quantity in ("omega", "conflict_rate")
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(10, max(3.2, 0.155 * len(names) + 1.5)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axis, quantity, title, palette in (
            (left, "omega", "Projection strength ω", "viridis"),
            (right, "conflict_rate", "Conflict rate: share of steps so far with ⟨g, δ⟩ < 0", "magma"),
        ):
            # ω is often far below 1, where a fixed scale would show nothing: the colour bar tells the scale
            top = max([0.1, *finite(values[quantity].ravel())])
            image = axis.pcolormesh(
                _edges(steps),
                np.arange(len(names) + 1),
                values[quantity],
                cmap=palette,
                vmin=0.0,
                vmax=top,
                rasterized=True,
            )
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("Optimizer step")
            axis.tick_params(axis="y", length=0)
            figure.colorbar(image, ax=axis, shrink=min(1.0, 14 / len(names)) if len(names) > 14 else 1.0, pad=0.02)
        _label_rows(left, names, np.arange(len(names)) + 0.5)
        left.invert_yaxis()
        note = f" · {hidden} norms and biases not shown" if hidden else ""
        figure.suptitle(f"{plot_label(method.label)}, seed {run.seed}{note}", fontsize=10, x=0.01, ha="left")
    return figure


def drift(comparison: Comparison, methods: Sequence[Method]) -> Figure:
    """‖θ − θ0‖ / ‖θ0‖ per layer at the end of training, mean over seeds, a mark per method. LoRA: ‖ΔW‖ / ‖W‖. Where all
    anchors are zero (a log of LoRA factors), ‖θ‖."""
    layers = [layer for method in methods for run in comparison.runs_of(method.key) for layer in run.drift.values()]
    relative = bool(finite(layer["relative_drift"] for layer in layers))
    means: dict[str, dict[str, float]] = {}
    for method in methods:
        runs = [run for run in comparison.runs_of(method.key) if run.drift]
        for name in runs[0].drift:
            present = finite(run.drift.get(name, {}).get("relative_drift" if relative else "drift") for run in runs)
            if present:
                means.setdefault(name, {})[method.key] = sum(present) / len(present)
    names, hidden = _shown(list(means))
    hue = colormaps[HUES.get(methods[0].family, "Greens")]
    colours = {method.key: hue(0.85) if index else "#6b6b6b" for index, method in enumerate(methods)}
    markers = "osD^v"
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, max(3.0, 0.155 * len(names) + 1.6)), layout="constrained")
        axis = figure.subplots()
        rows = np.arange(len(names))
        for row, name in enumerate(names):
            found = list(means[name].values())
            axis.plot([min(found), max(found)], [row, row], color="#bbbbbb", linewidth=1, zorder=1)
        for index, method in enumerate(methods):
            points = [(means[name][method.key], row) for row, name in enumerate(names) if method.key in means[name]]
            hollow = index == 0  # so that a mark on the same place shows through
            axis.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=40 if hollow else 16,
                marker=markers[index % len(markers)],
                facecolors="none" if hollow else colours[method.key],
                edgecolors=colours[method.key],
                linewidths=1.2 if hollow else 0.4,
                label=plot_label(method.label),
                zorder=2,
            )
        positive = [value for name in names for value in means[name].values() if value > 0]
        if positive and max(positive) > 20 * min(positive):
            axis.set_xscale("log")
        else:
            axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{100 * value:g} %" if relative else f"{value:g}")
        )
        axis.grid(axis="x")
        _label_rows(axis, names, rows)
        axis.set_ylim(len(names) - 0.4, -0.6)
        ratio = "‖ΔW‖ / ‖W‖" if methods[0].family == "lora" else "‖θ − θ₀‖ / ‖θ₀‖"
        axis.set_xlabel(ratio if relative else "‖θ − θ₀‖")
        note = f" ({hidden} norms and biases not shown)" if hidden else ""
        axis.set_title(f"Drift from the pre-trained weights{note}")
        legend(figure, *axis.get_legend_handles_labels())
    return figure


_SHORT = [
    (r"^(base_model\.model\.)", ""),
    (r"\.(default|weight)(?=\.|$)", ""),
    (r"\bmodel\.", ""),
    (r"vision_tower(\.vision_model)?|\bvisual\b|\bvision_model\b", "vision"),
    (r"\blanguage_model\b", "text"),
    (r"\bmulti_modal_projector\b", "projector"),
    (r"\bencoder\.", ""),
    (r"\b(layers|blocks|h)\.(\d+)", r"\2"),
    (r"\bself_attn\b|\battention\b", "attn"),
    (r"\b(\w+)_proj\b", r"\1"),
    (r"\bembeddings\.", ""),
    (r"\bembed_tokens\b", "embed"),
    (r"\blora_(A|B)\b", r"\1"),
    (r"\.", " "),
]


def short_name(name: str) -> str:
    """A layer's name as a reader would say it: "…language_model.layers.3.self_attn.q_proj.weight" → "text 3 attn q"."""
    for pattern, replacement in _SHORT:
        name = re.sub(pattern, replacement, name)
    return name


def _shown(names: list[str]) -> tuple[list[str], int]:
    """Layers that get a row, in the model's order, and how many norms and biases were left out for legibility."""
    matrices = [name for name in names if not name.endswith(".bias") and not re.search(r"norm", name.split(".")[-2])]
    return (matrices, len(names) - len(matrices)) if matrices and len(names) > _MATRIX_LIMIT // 2 else (names, 0)


def _label_rows(axis: Axes, names: Sequence[str], positions: np.ndarray) -> None:
    every = max(1, -(-len(names) // _MATRIX_LIMIT))
    labels = [short_name(name) for name in names][::every]
    axis.set_yticks(positions[::every], labels, fontsize=7.5)
    axis.tick_params(axis="y", length=0)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Column borders half-way between the recorded steps."""
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _number(layer: Mapping[str, Any] | None, quantity: str) -> float:
    value = None if layer is None else layer.get(quantity)
    return float("nan") if value is None else float(value)

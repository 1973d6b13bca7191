"""How figures look, and how they become PNG files or parts of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scale_digrap.evaluation.results import Cell, Method

INK, MUTED, GRID = "#1f2329", "#59636f", "#d5dbe1"
"""Text and axes, labels of points, grid: these become the page's own colours in `to_svg`."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
}
HUES = {"base": "Greys", "full": "Blues", "lora": "Oranges"}
MARKERS = "osD^vPX*<>"


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page, without a background; its text and axes take the page's colours from
    the custom properties `--text`, `--dim` and `--line`.

    Args:
        figure: to draw.
        name: makes the ids in it different from those of other figures on the page.
    """
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    for colour, place in ((INK, "--text"), (MUTED, "--dim"), (GRID, "--line")):
        text = text.replace(colour, f"var({place})")
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)


def method_colours(methods: Sequence[Method]) -> dict[str, tuple[float, ...]]:
    """One hue per family, from dark to light in the family's order; variants have the colour of their original."""
    colours: dict[str, tuple[float, ...]] = {}
    for family in {method.family: None for method in methods}:
        members = [method.key for method in methods if method.family == family and method.variant_of is None]
        palette = colormaps[HUES.get(family, "Greens")]
        shades = np.linspace(0.78, 0.42, len(members)) if len(members) > 1 else [0.55]
        colours.update({key: palette(shade) for key, shade in zip(members, shades, strict=True)})
    for method in methods:
        if method.variant_of is not None:
            colours[method.key] = colours.get(method.variant_of, (0.4, 0.6, 0.4, 1.0))
    return colours


def markers(methods: Sequence[Method]) -> dict[str, str]:
    """A mark per trained method; variants have that of their original."""
    originals = [method.key for method in methods if method.variant_of is None]
    return {
        method.key: MARKERS[originals.index(method.variant_of or method.key) % len(MARKERS)]
        if (method.variant_of or method.key) in originals
        else "o"
        for method in methods
    }


def error_bars(cell: Cell) -> list[list[float]]:
    if cell.std is not None:
        return [[100 * cell.std], [100 * cell.std]]
    # a percentile interval may lie to one side of the mean of very skewed scores: an error bar cannot be negative
    low, high = cell.mean - cell.interval.low, cell.interval.high - cell.mean
    return [[100 * max(0.0, low)], [100 * max(0.0, high)]]


def padded(values: Sequence[float], low: float = 0.0, high: float = 100.0) -> tuple[float, float]:
    """Axis limits around values, with room, within [low, high] and a little beyond."""
    span = max(2.0, float(np.ptp(values)) if len(values) else 2.0)
    return max(low - 2, min(values) - 0.15 * span), min(high + 2, max(values) + 0.15 * span)

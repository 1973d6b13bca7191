"""How figures look, and how they become PNG files or parts of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
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
    "text.parse_math": False,  # labels are people's own words, in which a $ is a $
}
HUES = {"base": "Greys", "full": "Blues", "lora": "Oranges"}
MARKERS = "osD^vPX*<>"
_DISTINCT = ("#2f7ebc", "#e08214", "#1b9e77", "#c2559b", "#7a6fd0", "#b3861f", "#d1495b", "#3aa6b9")
_PIXELS_PER_INCH = 103
"""On a page: text of 9 points is as large as the page's small print."""


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
    width = round(figure.get_size_inches()[0] * _PIXELS_PER_INCH)
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)
    return text.replace("<svg", f'<svg style="--width: {width}px"', 1)


def method_colours(methods: Sequence[Method]) -> dict[str, Any]:
    """One hue per family, dark and light, where families have two methods at most; else a colour per method. Published
    models are grey; variants have the colour of their original."""
    originals = [method for method in methods if method.variant_of is None]
    families = {method.family: [m.key for m in originals if m.family == method.family] for method in originals}
    colours: dict[str, Any] = {}
    if all(len(members) <= 2 for members in families.values()):
        for family, members in families.items():
            palette = colormaps[HUES.get(family, "Greens")]
            shades = np.linspace(0.78, 0.42, len(members)) if len(members) > 1 else [0.55]
            colours.update({key: palette(shade) for key, shade in zip(members, shades, strict=True)})
    else:
        trained = [method.key for method in originals if not method.seedless]
        colours.update({method.key: to_rgba("#8a8f96") for method in originals if method.seedless})
        colours.update({key: to_rgba(_DISTINCT[place % len(_DISTINCT)]) for place, key in enumerate(trained)})
    for method in methods:
        if method.variant_of is not None:
            colours[method.key] = colours.get(method.variant_of, (0.4, 0.6, 0.4, 1.0))
    return colours


def plot_label(text: str) -> str:
    """A label that a plot takes: of those that begin with ``_`` it would show nothing, and long ones fill it."""
    text = text if len(text) <= 60 else text[:59] + "…"
    return f"\u200b{text}" if text.startswith("_") else text


def legend(figure: Figure, handles: Iterable[Any], labels: Sequence[str]) -> None:
    """Below the axes, in as many columns as there is room for."""
    labels = [plot_label(label) for label in labels]
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(6, len(labels), int(figure.get_size_inches()[0] / (0.5 + 0.075 * longest))))
    figure.legend(list(handles), labels, loc="outside lower center", ncols=columns, fontsize=8.5)


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

"""The look of every picture: colours, fonts, and the conversion of a figure to a data URI."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from numpy.typing import ArrayLike

INK = "#1d2733"
MUTED = "#5d6b7a"
RULE = "#dfe4ea"
EMPTY = "#ccd2d9"

# The colours of Okabe and Ito, without the yellow, which is hard to see on white. The first two
# have the same meaning in all of a run's section: blue is assigned load, orange is used load.
ASSIGNED, USED = "#0072b2", "#d55e00"
GREEN, PINK, AMBER, SKY = "#00805f", "#b8578f", "#c98500", "#3a9bd6"
# For lines that differ by colour alone: both hue and lightness differ.
PURPLE = "#7a5fb5"
CYCLE = (ASSIGNED, USED, GREEN, PINK, INK, AMBER, SKY, PURPLE)
DASHES: tuple[str | tuple[float, tuple[float, ...]], ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
)

PAGE_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
LABEL_GAP = 0.135
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    # Text stays text, so it can be searched and uses the page's font. That font is narrower than
    # the one used for the layout, so text that fits here also fits on the page.
    "svg.fonttype": "none",
    "svg.hashsalt": "flexmoe_jax",
}


@dataclass(frozen=True)
class Picture:
    """A drawing, ready for the page.

    Attributes:
      name: stable identifier within a section.
      title: heading above it.
      source: `data:` URI of the image.
      alt: alternative text: a description of the content.
      caption: how to read it.
      wide: whether it takes the full width of the page.
      size: width and height in inches.
    """

    name: str
    title: str
    source: str
    alt: str
    caption: str
    wide: bool
    size: tuple[float, float]


def ramp(*colours: str) -> Colormap:
    """Returns a colour map through `colours`; cells without a value are grey."""
    return LinearSegmentedColormap.from_list("", colours).with_extremes(bad=EMPTY)


BLUES = ramp("#f3f6fa", "#bcd4ea", "#62a2d0", ASSIGNED, "#06335c")
ORANGES = ramp("#faf5f1", "#f6cfae", "#eb9556", USED, "#6b2c02")
GREENS = ramp("#f2f8f5", "#b9dfcf", "#5db396", GREEN, "#053f30")
PURPLES = ramp("#f6f4fa", "#d3c9e8", "#a18fcf", "#6a4fa8", "#33206b")
UNDER_OVER = ramp("#2b2f7f", "#8f93c9", "#f7f7f5", "#ef9f5e", "#a84300")


def draw(size: tuple[float, float], paint: Callable[[Figure], None], smooth: bool = False) -> str:
    """Runs `paint` on a new figure of `size` inches and returns it as an SVG `data:` URI.

    Args:
      size: width and height, inches.
      paint: function that draws on the figure.
      smooth: let the browser average the cells of a matrix instead of showing each as a block;
        for matrices whose cells are about as small as the screen's pixels.
    """
    text = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser renders the text, in a font that has these glyphs.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue().replace("'DejaVu Sans'", PAGE_FONT)
    if smooth:
        svg = svg.replace("image-rendering:crisp-edges;image-rendering:pixelated", "")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes at a position given in inches from the figure's top left corner."""
    total_width, total_height = figure.get_size_inches()
    bottom = total_height - top - height
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def text_width(text: str, points: float = 7) -> float:
    """Returns an upper estimate of the width of a line of text, in inches."""
    return 0.62 * points * len(text) / 72


def thin(positions: ArrayLike, widths: ArrayLike, scale: float) -> list[int]:
    """Returns indices of labels that fit side by side without touching, greedily from the first.

    Args:
      positions: centres of the labels in data units, ascending.
      widths: extents of the labels along the axis, inches.
      scale: inches per data unit.
    """
    kept: list[int] = []
    free = -np.inf
    centres = np.asarray(positions, dtype=float) * scale
    for index, (centre, width) in enumerate(zip(centres, np.asarray(widths), strict=True)):
        if centre - width / 2 >= free:
            kept.append(index)
            free = centre + width / 2
    return kept


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves positions on [0, 1] as little as needed to be `gap` apart; their order stays.

    Of equal positions the first goes on top. If they do not all fit, the lowest fall below 0.
    """
    order = np.lexsort((-np.arange(len(wanted)), np.asarray(wanted, dtype=float)))
    places = np.asarray(wanted, dtype=float)[order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    result = np.empty_like(places)
    result[order] = places
    return [float(place) for place in result]


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's label beside its last point, on the right of the axes, without overlap.

    Args:
      axes: fully drawn, with its final limits.
      ends: x, y, label and colour of each line's last point.
    """
    figure = axes.get_figure()
    if not isinstance(figure, Figure) or not ends:
        return
    height = axes.get_position().height * figure.get_size_inches()[1]
    gap = LABEL_GAP / height
    if len(ends) * gap > 1 + gap:
        return
    to_axes = axes.transAxes.inverted()
    wanted = [to_axes.transform(axes.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    beside = blended_transform_factory(axes.transAxes, axes.transAxes)
    for (x, y, label, colour), place in zip(ends, spread(wanted, gap), strict=True):
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords=beside,
            va="center",
            ha="left",
            color=colour,
            fontsize=7.5,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5},
        )

"""Parts of the matrix pictures: cells, colour scales, and axes with readable labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reporting import style
from experiments.reporting.orders import Order
from experiments.reporting.quantities import TIMES, count
from experiments.reporting.runs import Floats
from experiments.reporting.style import MUTED

FULL = 10.0
# All client pictures have these margins, so a client is at the same position in each.
LEFT, RIGHT, TOP, BOTTOM = 0.95, 0.95, 0.36, 0.5
INNER = FULL - LEFT - RIGHT
EACH_CLIENT = 40
# Each row is repeated, so that the edges of rows stay sharp if the browser blends narrow columns.
CRISP = 6
ROW_LABEL = 0.125
BAR_HEIGHT = 2.0
SHARE_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Scale:
    """Colour scale of a matrix: its colours and the values at the ends of its colour bar."""

    colours: Colormap
    low: float
    high: float
    title: str
    ticks: Sequence[float] | None = None
    tick_labels: Sequence[str] | None = None


EVENNESS = Scale(
    style.UNDER_OVER,
    low=0,
    high=2,
    title="of an\neven share",
    ticks=(0, 1, 2),
    tick_labels=("0", "even", f"≥ 2{TIMES}"),
)
HELD = Scale(style.BLUES, low=0, high=1, title="")


def show_matrix(axes: Axes, cells: Floats, scale: Scale, span: tuple[float, float]) -> None:
    """Draws cells (R, C), first row on top; `span` is the range of the columns on the x axis."""
    axes.imshow(
        np.repeat(cells, CRISP, axis=0),
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
        aspect="auto",
        interpolation="none",
        extent=(*span, len(cells) - 0.5, -0.5),
    )
    for spine in axes.spines.values():
        spine.set_visible(True)


def row_labels(axes: Axes, labels: Sequence[str], height: float) -> None:
    """Labels as many rows as there is room for; long labels are cut."""
    rows = np.arange(len(labels))
    kept = style.thin(rows, np.full(len(labels), ROW_LABEL), height / len(labels))
    axes.set_yticks(kept, [cut(labels[i], LEFT - 0.12) for i in kept])


def client_axis(axes: Axes, order: Order, classes: Sequence[str], kind: str, each: int) -> None:
    """Labels the x axis with client numbers or, for many clients, with their groups by class.

    `kind` is what the classes are, as in `Run.kind`; a column is the mean of `each` clients.
    """
    clients = len(order.clients)
    scale = INNER / clients
    merged = "" if each == 1 else f"; a column is the mean of {each}"
    if clients <= EACH_CLIENT or order.groups is None or len(classes) == 0:
        widths = [style.text_width(str(c)) + 0.05 for c in order.clients]
        kept = style.thin(np.arange(clients), widths, scale)
        axes.set_xticks(kept, [str(order.clients[i]) for i in kept])
        axes.set_xlabel(f"client{merged}")
        return
    starts = np.flatnonzero(np.diff(order.groups, prepend=-1))
    ends = np.append(starts[1:], clients)
    centres = (starts + ends - 1) / 2
    names = [cut(classes[order.groups[s]], 1.0) for s in starts]
    kept = style.thin(centres, [style.text_width(n) + 0.08 for n in names], scale)
    axes.set_xticks(starts - 0.5, minor=True)
    axes.tick_params(axis="x", which="minor", length=4, color=MUTED)
    axes.set_xticks([centres[i] for i in kept], [names[i] for i in kept])
    axes.tick_params(axis="x", which="major", length=0, pad=7)
    axes.set_xlabel(f"{count(clients)} clients, grouped by most frequent {kind}{merged}")


def colour_bar(figure: Figure, left: float, height: float, scale: Scale, top: float = TOP) -> None:
    """Draws the colour bar of `scale` with its title above it; position and height in inches."""
    axes = style.axes_at(figure, left, top + 0.36, 0.11, max(height - 0.36, 0.5))
    axes.imshow(
        np.linspace(1, 0, 128)[:, None],
        cmap=scale.colours,
        aspect="auto",
        interpolation="none",
        extent=(0, 1, scale.low, scale.high),
    )
    axes.set_xticks([])
    axes.yaxis.tick_right()
    for spine in axes.spines.values():
        spine.set_visible(False)
    if scale.ticks is not None:
        axes.set_yticks(scale.ticks, scale.tick_labels)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.annotate(
        scale.title,
        (0, 1),
        xytext=(0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        fontsize=7,
        color=MUTED,
    )


def share_scale(colours: Colormap, share: Floats, title: str) -> Scale:
    """Returns a scale from 0 to a round share that few cells exceed, so small shares show, too."""
    finite = share[np.isfinite(share)]
    largest = float(finite.max(initial=0.0))
    usual = float(np.quantile(finite, 0.998)) if finite.size else 1.0
    high = next((step for step in SHARE_STEPS if step >= usual), 1.0)
    top = f"{'≥ ' if largest > high + 1e-9 else ''}{100 * high:g}%"
    return Scale(colours, 0, high, title, (0, high / 2, high), ("0%", f"{50 * high:g}%", top))


def rows_height(rows: int, most: float = 5.2) -> float:
    """Returns the height in inches of a matrix with this number of rows."""
    return float(np.clip(0.21 * rows, 1.1, most))


def dense(cells: Floats, width: float) -> bool:
    """Whether the cells are about as narrow as a screen pixel, 1/100 inch."""
    return int(cells.shape[1]) > 25 * width


def cut(text: str, room: float) -> str:
    """Shortens a text to a width in inches."""
    fits = int(room / style.text_width("x"))
    return text if len(text) <= fits else text[: fits - 1] + "…"

"""Line charts: panels on a grid, each with its own axes, every line labelled at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.reporting import style
from experiments.reporting.quantities import MINUS
from experiments.reporting.runs import Floats
from experiments.reporting.style import Picture

FULL, HALF = 10.0, 4.85
HEIGHT, SHORT = 2.55, 2.0
LEFT, TOP, BOTTOM = 0.5, 0.38, 0.48
MARKERS_UP_TO = 30
LOG_FLOOR = 1e-4
ROUND_STEPS = (1, 2, 2.5, 5, 10)

Dash = str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Line:
    """One curve: x and y of shape (T',), in the panel's units; an empty `label` is not drawn.

    If the curve is a mean of several runs, `low` and `high`, both (T',), are their extremes.
    """

    x: Floats
    y: Floats
    label: str
    colour: str
    dash: Dash = "solid"
    strength: float = 1.0
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Panel:
    """One coordinate system: its heading with the unit, its curves and the kind of its y axis.

    With `ticks`, x is the index of a name in them, and the spread of a point is a vertical stroke.
    """

    title: str
    lines: Sequence[Line]
    kind: str = "linear"
    x_label: str = "round"
    ticks: Sequence[str] = ()


@dataclass(frozen=True)
class Grid:
    """Layout of the panels.

    Attributes:
      columns: panels in a row; None for all of them.
      shared: whether all panels have the same y limits.
      height: height of a row, inches.
      wide: whether they take the full width; None: if there are several panels.
    """

    columns: int | None = None
    shared: bool = False
    height: float = HEIGHT
    wide: bool | None = None


def draw_panels(
    name: str,
    title: str,
    panels: Sequence[Panel],
    caption: str,
    grid: Grid = Grid(),
    alt: str = "",
) -> Picture | None:
    """Draws panels on a grid; None if none of them has a finite point.

    Args:
      name: identifier of the picture.
      title: heading of the picture.
      panels: panels, row by row; empty ones are left out.
      caption: how to read it.
      grid: layout.
      alt: addition to the alternative text.
    """
    filled = [replace(p, lines=[ln for ln in p.lines if _drawable(ln)]) for p in panels]
    filled = [p for p in filled if p.lines]
    if not filled:
        return None
    wide, height = len(panels) > 1 if grid.wide is None else grid.wide, grid.height
    across = min(grid.columns or len(filled), len(filled))
    down = -(-len(filled) // across)
    width = FULL if wide else HALF
    cell = width / across
    labelled = max(style.text_width(ln.label, 8) for p in filled for ln in p.lines)
    right = 0.24 + labelled

    def paint(figure: Figure) -> None:
        drawn = []
        for i, panel in enumerate(filled):
            axes = style.axes_at(
                figure,
                LEFT + i % across * cell,
                TOP + i // across * height,
                cell - LEFT - right,
                height - TOP - BOTTOM,
            )
            _paint_panel(axes, panel)
            drawn.append(axes)
        if grid.shared:
            limits = [axes.get_ylim() for axes in drawn]
            for axes in drawn:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        for axes, panel in zip(drawn, filled, strict=True):
            _finish_panel(axes, panel, steps_up=5 if height > SHORT else 3)

    inches = (width, down * height)
    shown = "; ".join(p.title for p in filled)
    return Picture(
        name=name,
        title=title,
        source=style.draw(inches, paint),
        alt=f"Line chart: {shown}" + (f". {alt[0].upper()}{alt[1:]}." if alt else "."),
        caption=caption,
        wide=wide,
        size=inches,
    )


def _paint_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.spines["left"].set_visible(False)
    for line in panel.lines:
        axes.plot(
            line.x,
            np.maximum(line.y, LOG_FLOOR) if panel.kind == "log" else line.y,
            color=line.colour,
            linestyle=line.dash,
            linewidth=1.6 if line.strength == 1 else 0.8,
            alpha=line.strength,
            marker="o" if line.x.size <= MARKERS_UP_TO else None,
            markersize=2.6,
            markeredgewidth=0,
        )
        _paint_spread(axes, panel, line)
    low, high = _reach(panel.lines)
    if panel.kind == "percent":
        room = max(0.06 * (high - low), 0.01)
        axes.set_ylim(max(low - room, 0.0), min(high + room, 1.0))
    elif panel.kind == "log":
        axes.set_yscale("log")
        low, high = max(low, LOG_FLOOR), max(high, 10 * LOG_FLOOR)
        axes.set_ylim(low / 1.25, 1.25 * high)
    elif panel.kind == "positive":
        axes.set_ylim(0, 1.12 * high if high > 0 else 1)
    else:
        room = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - room, high + room)


def _paint_spread(axes: Axes, panel: Panel, line: Line) -> None:
    if line.low is None or line.high is None:
        return
    if panel.ticks:
        axes.vlines(line.x, line.low, line.high, color=line.colour, linewidth=0.8, alpha=0.6)
    else:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.13, linewidth=0)


def _finish_panel(axes: Axes, panel: Panel, steps_up: int) -> None:
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
    else:
        whole = panel.x_label == "round"
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, min_n_ticks=1))
    if panel.kind == "log":
        low, high = axes.get_ylim()
        steps = (1, 2, 5) if high < 50 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(10, subs=steps, numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_log_label))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(steps_up, steps=ROUND_STEPS))
        percent = panel.kind == "percent"
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{100 * v:.6g}" if percent else _plain(v))
        )
    ends = []
    for line in panel.lines:
        if line.label:
            last = np.flatnonzero(np.isfinite(line.y))[-1]
            y = max(line.y[last], LOG_FLOOR) if panel.kind == "log" else line.y[last]
            ends.append((float(line.x[last]), float(y), line.label, line.colour))
    style.end_labels(axes, ends)


def _plain(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1e3:,.6g}k"
    return f"{value:.6g}".replace("-", MINUS)


def _log_label(value: float, _: int) -> str:
    return "≤ 10⁻⁴" if value <= LOG_FLOOR else f"{value:.6g}"


def _drawable(line: Line) -> bool:
    return bool(np.isfinite(line.y).any())


def _reach(lines: Sequence[Line]) -> tuple[float, float]:
    every = [y for line in lines for y in (line.y, line.low, line.high) if y is not None]
    finite = np.concatenate([y[np.isfinite(y)] for y in every])
    return float(finite.min()), float(finite.max())

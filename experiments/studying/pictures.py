"""Pictures of a study: the results of several methods, each with several seeds, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reporting import style
from experiments.reporting.curves import Pen, models
from experiments.reporting.line_charts import (
    FULL,
    HALF,
    HEIGHT,
    ROUND_STEPS,
    Grid,
    Line,
    Panel,
    draw_panels,
)
from experiments.reporting.quantities import MINUS, LossUnit
from experiments.reporting.runs import Floats, Run
from experiments.reporting.style import ASSIGNED, INK, MUTED, RULE, USED, Picture
from experiments.studying.rows import Row
from experiments.studying.sheets import BALANCE
from experiments.studying.statistics import Difference

SEEDS = "the line is the mean over seeds, the shade goes from the lowest seed to the highest"
BAR = 0.2
LABEL = 0.14


def curves(
    methods: Mapping[str, Sequence[Run]], drawn: Mapping[str, Pen], unit: LossUnit
) -> list[Picture | None]:
    """Draws accuracy and loss by round, one line for each method.

    Args:
      methods: method to its finished runs.
      drawn: method to its pen.
      unit: unit in which losses are shown.
    """

    def panel(key: str, title: str, kind: str, nats: float = 1.0) -> Panel:
        found = [(drawn[name], *_by_round(runs, key)) for name, runs in methods.items() if runs]
        lines = [_line(x, [[v / nats for v in y] for y in each], pen) for pen, x, each in found]
        return Panel(title, lines, kind)

    accuracies = [
        panel(key, f"{word.capitalize()} accuracy, %", "percent")
        for key, word, _ in models("accuracy")
    ]
    losses = [
        panel(key, unit.titled(f"{word.capitalize()} loss"), "linear", unit.nats)
        for key, word, _ in models("loss")
    ]
    read = f"Lettered as in the list of methods; {SEEDS}."
    height = max(HEIGHT, 0.9 + style.LABEL_GAP * len(methods))
    better = (("Accuracy", accuracies, "Higher"), ("Loss", losses, "Lower"))
    return [
        draw_panels(
            title.lower(),
            title,
            panels,
            f"{read} {side} is better; one scale for all.",
            Grid(shared=True, height=height),
        )
        for title, panels, side in better
    ]


def along_axis(
    axis: str,
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Row]],
    drawn: Mapping[str, Pen],
) -> Picture | None:
    """Draws final accuracy against a further axis, one line for each method.

    Args:
      axis: name of the axis.
      names: names on it, in order; one that is no number is not joined to its neighbours.
      rows: method to name to row.
      drawn: method to its pen.
    """
    places = axis_places(names)

    def line(found: Mapping[str, Row], word: str, pen: Pen) -> Line:
        seeds = {
            float(i): found[name].values(f"{word}/final")
            for i, name in enumerate(names)
            if name in found
        }
        return _line(places, [seeds.get(place, []) for place in places.tolist()], pen)

    panels = [
        Panel(
            f"{word.capitalize()} accuracy, %",
            [line(found, word, drawn[method]) for method, found in rows.items()],
            "percent",
            axis,
            ticks=tuple(names),
        )
        for _, word, _ in models("accuracy")
    ]
    return draw_panels(
        f"along-{axis}",
        f"Accuracy against {axis}",
        panels,
        "Final accuracy, lettered as in the list of methods: the mean over seeds, and a stroke "
        "from the lowest seed to the highest. Higher is better; one scale for all.",
        Grid(shared=True, height=max(HEIGHT, 0.9 + style.LABEL_GAP * len(rows))),
    )


def axis_places(names: Sequence[str]) -> Floats:
    """Returns the places of names on an axis, 0, 1, ..., and of the breaks of a line between them.

    A line breaks halfway between two names unless both are numbers.
    """
    numeric = [name.replace(".", "", 1).isdecimal() for name in names]
    breaks = [i + 0.5 for i, both in enumerate(pairwise(numeric)) if not all(both)]
    return np.sort(np.array([*range(len(names)), *breaks], dtype=float))


def balance_bars(rows: Sequence[Row]) -> Picture | None:
    """Draws the four balance metrics, with a bar for each method and a dot for each seed."""
    rows = [row for row in rows if row.seeds]
    if not rows:
        return None
    titles = ("assigned, per round", "assigned, cumulative", "used, per round", "used, cumulative")
    names = [row.method for row in rows]
    left = 0.2 + max(style.text_width(name, 7.5) for name in names)
    inches = (FULL, 0.85 + BAR * len(rows))
    wide = (FULL - left) / len(BALANCE)
    places = np.arange(len(rows))[::-1]

    def paint(figure: Figure) -> None:
        drawn = []
        for i, (key, title) in enumerate(zip(BALANCE, titles, strict=True)):
            axes = style.axes_at(figure, left + i * wide, 0.38, wide - 0.3, inches[1] - 0.85)
            colour = ASSIGNED if key.startswith("assigned") else USED
            means = [float(np.mean(row.values(key) or [math.nan])) for row in rows]
            axes.barh(places, means, height=0.62, color=colour, alpha=0.75, linewidth=0)
            for place, row in zip(places, rows, strict=True):
                values = row.values(key)
                axes.plot(values, [place] * len(values), "o", color=INK, ms=2.4, mew=0)
            axes.set_title(f"CV of load {title}")
            axes.set_yticks(places, names if i == 0 else [""] * len(names))
            axes.tick_params(axis="y", labelcolor=INK, labelsize=7.5)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.grid(axis="x")
            axes.spines["bottom"].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}"))
            drawn.append(axes)
        most = max(axes.get_xlim()[1] for axes in drawn)
        for axes in drawn:
            axes.set_xlim(0, max(most, 0.01))

    return Picture(
        name="balance",
        title="Balance of the experts' load",
        source=style.draw(inches, paint),
        alt="Bar chart of four coefficients of variation for each method.",
        caption="Coefficient of variation across experts, 0 is perfectly even: bars are means over "
        "seeds, dots the seeds. Per round: mean over all rounds; cumulative: of the load summed "
        "over all rounds.",
        wide=True,
        size=inches,
    )


def trade_off(rows: Sequence[Row], drawn: Mapping[str, Pen]) -> Picture | None:
    """Draws final global against personal accuracy: a letter per method, a dot per seed."""
    found = [(drawn[row.method], row.points("personal/final", "global/final")) for row in rows]
    clouds = [(pen, np.array(points)) for pen, points in found if points]
    if not clouds:
        return None
    inches = (HALF, 3.5)
    width, height = HALF - 0.75, 2.55

    def paint(figure: Figure) -> None:
        axes = style.axes_at(figure, 0.55, 0.38, width, height)
        points = np.concatenate([cloud for _, cloud in clouds])
        room = np.maximum(0.14 * np.ptp(points, axis=0), 0.005)
        low, high = points.min(axis=0) - room, points.max(axis=0) + room
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.grid()
        axes.set_title("Global accuracy, %")
        axes.set_xlabel("personal accuracy, %")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
            side.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.6g}"))
        scale = np.array([width, height]) / (high - low)
        means = np.array([cloud.mean(axis=0) for _, cloud in clouds])
        labels = place_labels((means - low) * scale, (width, height)) / scale + low
        for (pen, cloud), mean, label in zip(clouds, means, labels, strict=True):
            axes.plot(*cloud.T, "o", color=pen.colour, ms=2.4, mew=0, alpha=0.45)
            axes.plot(*mean, "o", color=pen.colour, ms=5, mew=0)
            axes.annotate(
                pen.letter,
                xy=tuple(mean),
                xytext=tuple(label),
                color=pen.colour,
                fontsize=7.5,
                fontweight="bold",
                ha="center",
                va="center",
                arrowprops={"arrowstyle": "-", "color": pen.colour, "lw": 0.5, "alpha": 0.5},
            )

    return Picture(
        name="trade-off",
        title="Personal against global accuracy",
        source=style.draw(inches, paint),
        alt="Scatter plot of final personal and global accuracy of each method.",
        caption="At the end, lettered as in the list of methods: large dots are means over seeds, "
        "small ones the seeds. Up and to the right is better.",
        wide=False,
        size=inches,
    )


def forest(
    differences: Mapping[str, Difference], reference: str, drawn: Mapping[str, Pen], what: str
) -> Picture | None:
    """Draws differences from the reference with their intervals, one row for each method.

    Args:
      differences: method to its difference.
      reference: method that the others are compared with.
      drawn: method to its pen.
      what: name of what is compared, to begin a sentence.
    """
    known = {name: d for name, d in differences.items() if d.n}
    if not known:
        return None
    left = 0.2 + max(style.text_width(name, 7.5) for name in known)
    inches = (HALF, max(3.5, 0.95 + BAR * len(known)))
    places = np.arange(len(known))[::-1]

    def paint(figure: Figure) -> None:
        axes = style.axes_at(figure, left, 0.38, HALF - left - 0.2, inches[1] - 0.86)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for place, (name, d) in zip(places, known.items(), strict=True):
            colour = drawn[name].colour
            if math.isfinite(d.margin):
                axes.hlines(
                    place, d.mean - d.margin, d.mean + d.margin, color=colour, linewidth=1.4
                )
            axes.plot(d.mean, place, "o", color=colour, ms=4, mew=0)
        axes.set_title("Percentage points")
        axes.set_yticks(places, list(known))
        axes.tick_params(axis="y", labelcolor=INK, labelsize=7.5)
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.grid(axis="x", color=RULE)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{100 * v:+.6g}".replace("-", MINUS) if v else "0")
        )

    return Picture(
        name="differences",
        title=f"Difference from {reference}",
        source=style.draw(inches, paint),
        alt=f"Mean difference of each method from {reference}, with intervals.",
        caption=f"{what} at the end, method minus {reference} on the same "
        "seed: mean and 95 % interval (Student t, paired). One that spans 0 decides nothing.",
        wide=False,
        size=inches,
    )


def place_labels(points: Floats, box: tuple[float, float]) -> Floats:
    """Places a letter beside each point, away from all points and from the letters before it.

    Args:
      points: (n, 2) inches from the lower left corner of the axes.
      box: width and height of the axes, inches.

    Returns:
      (n, 2) centres of the letters, inches; if every place overlaps, the one that overlaps least.
    """
    angles = np.arange(16) * np.pi / 8
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    tries = np.concatenate([radius * ring for radius in (0.13, 0.2, 0.3, 0.42, 0.56)])
    placed = np.empty((0, 2))
    for point in points:
        at = point + tries
        near_points = _crowd(at, points, 0.11)
        near_labels = _crowd(at, placed, LABEL)
        outside = ((at < LABEL / 2) | (at > np.asarray(box) - LABEL / 2)).any(axis=1)
        # Among equally good places the nearest wins, since it comes first.
        best = int(np.argmin(near_points + 2 * near_labels + 4 * outside))
        placed = np.vstack([placed, at[best]])
    return placed


def _crowd(places: Floats, others: Floats, distance: float) -> Floats:
    """Counts for each place the others that are closer than `distance`."""
    apart = np.linalg.norm(places[:, None] - others[None], axis=2)
    return (apart < distance).sum(axis=1).astype(float)


def _line(x: Floats, values: Sequence[Sequence[float]], pen: Pen) -> Line:
    """Returns the line of a method: its mean over seeds, with the lowest and highest seed."""
    filled = [seeds or [math.nan] for seeds in values]
    mean, low, high = (np.array([f(seeds) for seeds in filled]) for f in (np.mean, min, max))
    return Line(x, mean, pen.letter, pen.colour, pen.dash, low=low, high=high)


def _by_round(runs: Sequence[Run], key: str) -> tuple[Floats, list[list[float]]]:
    """Returns the rounds in which any run has the metric, and the values of the runs that do."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for number, value in zip(*run.series(key), strict=True):
            found.setdefault(float(number), []).append(float(value))
    rounds = sorted(found)
    return np.array(rounds), [found[number] for number in rounds]

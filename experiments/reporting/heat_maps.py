"""Pictures of matrices: experts over rounds, and labels and experts over clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reporting import style
from experiments.reporting.matrix import (
    BAR_HEIGHT,
    BOTTOM,
    EACH_CLIENT,
    EVENNESS,
    FULL,
    HELD,
    INNER,
    LEFT,
    TOP,
    Scale,
    client_axis,
    colour_bar,
    dense,
    row_labels,
    rows_height,
    share_scale,
    show_matrix,
)
from experiments.reporting.orders import Order, order_of, pool, shares
from experiments.reporting.quantities import byte_unit, count, ratio
from experiments.reporting.run_files import Numbers
from experiments.reporting.runs import Floats, Run, assigned_unit
from experiments.reporting.style import ASSIGNED, INK, MUTED, USED, Picture

CLIENT_COLUMNS, ROUND_COLUMNS = 1000, 250
# The most kinds of examples (labels or domains) that a picture has room for.
MOST_KINDS = 40
TOTALS = 1.75
ROUND_STEPS = (1, 2, 2.5, 5, 10)


def load_pictures(run: Run) -> list[Picture]:
    """Draws experts × rounds, assigned and used load, both with the most used expert on top."""
    _, used = run.vectors("load/usage")
    _, assigned = run.vectors("load/assigned")
    basis = used if used.size else assigned
    if not basis.size:
        return []
    order = np.argsort(-np.nansum(basis, axis=0), kind="stable")
    unit = assigned_unit(run)
    made = [
        _load(run, "load/assigned", order, "Load assigned to each expert", ASSIGNED, unit),
        _load(run, "load/usage", order, "Load used on each expert", USED, run.units),
    ]
    return [picture for picture in made if picture is not None]


def client_pictures(run: Run) -> list[Picture]:
    """Draws labels, holders, routing and fitness, with clients as columns in the same order."""
    order = order_of(run)
    if order is None:
        return []
    made = [
        _labels(run, order),
        _holders(run, order),
        _routing(run, order),
        _specialisation(run),
        _fitness(run, order),
    ]
    return [picture for picture in made if picture is not None]


def _load(run: Run, key: str, order: Numbers, title: str, colour: str, unit: str) -> Picture | None:
    rounds, load = run.vectors(key)
    if not load.size or load.shape[1] != len(order):
        return None
    even = np.nan_to_num(load).mean(axis=1, keepdims=True)
    relative = np.divide(load, even, out=np.full(load.shape, np.nan), where=even > 0)
    cells, each = pool(relative.T[order], ROUND_COLUMNS, rounds)
    totals = np.nansum(load, axis=0)[order]
    height = rows_height(len(order))
    size = (FULL, TOP + height + BOTTOM)
    span = (rounds[0] - 0.5, rounds[0] - 0.5 + cells.shape[1] * each)
    counted = "holders, summed over rounds"
    if unit != "holders":
        counted = f"{unit.partition(' ')[0]}, all rounds"

    def paint(figure: Figure) -> None:
        width = FULL - LEFT - TOTALS - 2.0
        axes = style.axes_at(figure, LEFT, TOP, width, height)
        show_matrix(axes, cells, EVENNESS, span)
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=ROUND_STEPS))
        axes.set_xlabel("round" if each == 1 else f"round (a column is the mean of {each})")
        row_labels(axes, [f"expert {e}" for e in order], height)
        axes.set_title("Each round, relative to that round's even share")
        colour_bar(figure, LEFT + width + 0.12, min(height, BAR_HEIGHT), EVENNESS)
        bars = style.axes_at(figure, FULL - TOTALS - 0.1, TOP, TOTALS, height)
        factor, prefix = _prefix(totals.max(initial=0))
        bars.barh(np.arange(len(order)), totals / factor, height=0.72, color=colour)
        bars.axvline(totals.mean() / factor, color=INK, linewidth=0.8)
        bars.set_ylim(len(order) - 0.5, -0.5)
        bars.set_yticks([])
        bars.set_xlim(0, max(1.05 * totals.max(initial=0) / factor, 1e-9))
        bars.xaxis.set_major_locator(MaxNLocator(3))
        bars.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}{prefix}" if v else "0"))
        bars.spines["bottom"].set_visible(False)
        bars.set_title("Whole run")
        bars.set_xlabel(counted)

    return Picture(
        name=key.replace("/", "-"),
        title=title,
        source=style.draw(size, paint, smooth=dense(cells, FULL - LEFT - TOTALS - 2.0)),
        alt=f"Heat map, {len(order)} experts by {load.shape[0]} rounds, and bars of their totals: "
        f"from {count(totals.min())} to {count(totals.max())} {unit}, mean {count(totals.mean())}.",
        caption="A pale row is an expert with its even share; orange is more, blue less than that. "
        f"Bars give the {counted}; the dark line is the mean, where all would end if even. "
        "Most used expert on top.",
        wide=True,
        size=size,
    )


def _per_client(axes: Axes, name: str, values: np.ndarray, colour: str) -> None:
    """Draws a strip of bars, one for each client, aligned with the columns of the map above."""
    axes.set_title(f"{name.capitalize()} per client", pad=4)
    if len(values) <= 4 * EACH_CLIENT:
        places = np.arange(len(values))
        axes.bar(places, values, 1.0, color=colour, edgecolor="white", linewidth=0.8)
    else:
        axes.stairs(values, np.arange(len(values) + 1) - 0.5, fill=True, color=colour, linewidth=0)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylim(0, 1.08 * max(values.max(), 1))
    axes.set_yticks([0, values.max()], ["0", count(values.max())])
    axes.spines["left"].set_visible(False)
    axes.set_xticks([])


def _labels(run: Run, order: Order) -> Picture | None:
    counts = run.arrays.get("label_counts")
    capacity = run.arrays.get("capacity")
    if counts is None or not counts.size:
        return None
    classes = [str(c) for c in run.arrays.get("classes", np.arange(counts.shape[1]))]
    share = shares(counts)[order.clients].T
    examples = counts.sum(axis=1)[order.clients]
    height = rows_height(len(classes), most=4.2)
    strips = [("examples", examples, MUTED)]
    if capacity is not None:
        strips.append(("experts held", capacity[order.clients], ASSIGNED))
    strip, between = 0.62, 0.34
    top = TOP + height + between
    size = (FULL, top + len(strips) * (strip + between) - between + BOTTOM)
    cells, each = pool(share, CLIENT_COLUMNS)
    scale = share_scale(style.PURPLES, share, "of client's\nexamples")

    def paint(figure: Figure) -> None:
        axes = style.axes_at(figure, LEFT, TOP, INNER, height)
        show_matrix(axes, cells, scale, (-0.5, cells.shape[1] * each - 0.5))
        axes.set_xlim(-0.5, len(examples) - 0.5)
        axes.set_title(f"{run.kind.capitalize()} mix")
        axes.set_xticks([])
        row_labels(axes, classes, height)
        colour_bar(figure, LEFT + INNER + 0.12, min(height, BAR_HEIGHT), scale)
        below = axes
        for i, (name, values, colour) in enumerate(strips):
            below = style.axes_at(figure, LEFT, top + i * (strip + between), INNER, strip)
            _per_client(below, name, values, colour)
        client_axis(below, order, classes, run.kind, each)

    held = ""
    if capacity is not None:
        held = f"; clients hold {capacity.min()} to {capacity.max()} experts"
    return Picture(
        name="labels",
        title=f"How {run.kind}s fall on clients",
        source=style.draw(size, paint, smooth=dense(cells, INNER)),
        alt=f"Heat map, {len(classes)} {run.kind}s by {len(examples)} clients; "
        f"{count(examples.min())} to {count(examples.max())} examples each{held}.",
        caption=f"Each column is a client, grouped by its most frequent {run.kind}: a dark cell is "
        f"a {run.kind} that makes up much of its data; below, how many examples it has"
        + (" and how many experts it can hold." if capacity is not None else "."),
        wide=True,
        size=size,
    )


def _holders(run: Run, order: Order) -> Picture | None:
    held, now = run.arrays.get("held_rounds"), run.arrays.get("holds")
    if held is None and now is None:
        return None
    panels: list[tuple[str, Floats, Scale]] = []
    marks = None
    if held is not None:
        share = held / max(run.rounds, held.max(initial=0), 1)
        scale = share_scale(style.BLUES, share, "of rounds\nheld")
        panels.append(("Share of all rounds in which the client held the expert", share, scale))
    if now is not None and (held is None or len(now) > 2 * EACH_CLIENT):
        panels.append(("Dark: held in the last assignment", now.astype(float), HELD))
    elif now is not None:
        marks = now
    last = "The lower map is" if len(panels) > 1 else "A dot marks" if marks is not None else ""
    return _client_maps(
        run,
        order,
        "holders",
        "Who holds which expert",
        panels,
        "Dark cells are lasting pairs of client and expert; an even blue is a pair that comes and "
        "goes." + (f" {last} the last assignment." if last else ""),
        marks,
    )


def _routing(run: Run, order: Order) -> Picture | None:
    usage = run.arrays.get("usage")
    if usage is None or not np.nansum(usage):
        return None
    share = shares(usage)
    scale = share_scale(style.ORANGES, share, f"of client's\n{run.units}")
    return _client_maps(
        run,
        order,
        "routing",
        f"Where each client sends its {run.units}",
        [(f"Share of the client's {run.units} that its gate sent to the expert", share, scale)],
        "A column adds up to 100 %: one dark cell is a client that leans on one expert; a dark "
        f"stretch of a row is an expert that serves clients with like {run.kind}s.",
    )


def _specialisation(run: Run) -> Picture | None:
    """Draws experts × kinds of examples: which kinds each expert serves."""
    usage, counts = run.arrays.get("usage"), run.arrays.get("label_counts")
    kinds = [str(kind) for kind in run.arrays.get("classes", ())]
    if usage is None or counts is None or not np.nansum(usage) or not 1 < len(kinds) <= MOST_KINDS:
        return None
    # A client without examples has no shares, and one without usage sent nothing.
    mix, sent = np.nan_to_num(shares(counts)), np.nan_to_num(usage.astype(float))
    served = shares(mix.T @ sent)  # (kinds, experts)
    # Experts are sorted by the kind that they serve most: specialisation shows as a diagonal.
    rows = np.lexsort((-served.max(axis=0), served.argmax(axis=0)))
    cells = served.T[rows]
    scale = share_scale(style.ORANGES, cells, f"of the kind's\n{run.units}")
    height = rows_height(len(rows))
    bottom = 0.3 + 0.075 * max(map(len, kinds)) * (len(kinds) > 12) + 0.2
    size = (FULL, height + TOP + bottom)

    def paint(figure: Figure) -> None:
        axes = style.axes_at(figure, LEFT, TOP, INNER, height)
        show_matrix(axes, cells, scale, (-0.5, len(kinds) - 0.5))
        axes.set_title(f"Share of what clients with this {run.kind} sent to the expert")
        axes.set_xticks(range(len(kinds)), kinds, rotation=90 if len(kinds) > 12 else 0)
        axes.tick_params(axis="x", length=0)
        row_labels(axes, [f"expert {e}" for e in rows], height)
        colour_bar(figure, LEFT + INNER + 0.12, min(height, BAR_HEIGHT), scale, TOP)

    return Picture(
        name="specialisation",
        title=f"Which {run.kind}s each expert serves",
        source=style.draw(size, paint),
        alt=f"Heat map, {len(rows)} experts by {len(kinds)} {run.kind}s.",
        caption="A column adds up to 100 %, of the whole run. What a client sent to an expert is "
        f"divided over its {run.kind}s as its examples are. Few dark cells a column: experts have "
        "specialised; an even colour: it does not matter which experts a client has.",
        wide=True,
        size=size,
    )


def _fitness(run: Run, order: Order) -> Picture | None:
    fitness = run.arrays.get("fitness")
    if fitness is None or not np.isfinite(fitness).any():
        return None
    shown = fitness.astype(float)
    tried = run.arrays.get("usage", run.arrays.get("held_rounds"))
    remark = ""
    if tried is not None:
        untouched = fitness[~(tried > 0)]
        if 0 < untouched.size < fitness.size and np.ptp(untouched) < 1e-9:
            shown = np.where(tried > 0, shown, np.nan)
            remark = f" Grey pairs were never tried and keep the start value {ratio(untouched[0])}."
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = 0.5 * max(1.0, abs(high))
        low, high = low - room, high + room
    return _client_maps(
        run,
        order,
        "fitness",
        "Fitness matrix",
        [
            (
                "Learned fitness of the expert for the client",
                shown,
                Scale(style.GREENS, low, high, "fitness"),
            )
        ],
        f"Dark means that the expert has served the client well.{remark}",
    )


def _client_maps(
    run: Run,
    order: Order,
    name: str,
    title: str,
    panels: Sequence[tuple[str, Numbers, Scale]],
    caption: str,
    marks: Numbers | None = None,
) -> Picture:
    """Draws maps of experts × clients below each other; `marks` (C, E) puts dots on the first."""
    clients, experts = panels[0][1].shape
    classes = [str(c) for c in run.arrays.get("classes", ())]
    height = rows_height(experts)
    step = height + TOP
    size = (FULL, len(panels) * step + BOTTOM)

    def arranged(matrix: Numbers) -> tuple[Floats, int]:
        return pool(matrix[order.clients][:, order.experts].T.astype(float), CLIENT_COLUMNS)

    blended = dense(arranged(panels[0][1])[0], INNER)

    def paint(figure: Figure) -> None:
        for i, (heading, matrix, scale) in enumerate(panels):
            axes = style.axes_at(figure, LEFT, TOP + i * step, INNER, height)
            cells, each = arranged(matrix)
            show_matrix(axes, cells, scale, (-0.5, cells.shape[1] * each - 0.5))
            axes.set_xlim(-0.5, clients - 0.5)
            axes.set_title(heading)
            axes.set_xticks([])
            row_labels(axes, [f"expert {e}" for e in order.experts], height)
            if scale.title:
                colour_bar(
                    figure, LEFT + INNER + 0.12, min(height, BAR_HEIGHT), scale, TOP + i * step
                )
            if i == 0 and marks is not None:
                rows, columns = np.nonzero(marks[order.clients][:, order.experts].T)
                axes.scatter(
                    columns, rows, s=15, color="white", edgecolors=INK, linewidths=0.7, zorder=3
                )
            if i == len(panels) - 1:
                client_axis(axes, order, classes, run.kind, each)

    return Picture(
        name=name,
        title=title,
        source=style.draw(size, paint, smooth=blended),
        alt=f"Heat map, {experts} experts by {clients} clients. {panels[0][0]}.",
        caption=caption,
        wide=True,
        size=size,
    )


def _prefix(largest: float) -> tuple[float, str]:
    factor, unit = byte_unit(largest)
    return factor, {"kB": "k", "MB": "M", "GB": "G", "TB": "T"}.get(unit, "")

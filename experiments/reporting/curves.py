"""Pictures of what changes from round to round: accuracy, loss, balance, traffic, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.reporting import ink
from experiments.reporting.ink import ASSIGNED, GREEN, INK, PINK, USED, Picture
from experiments.reporting.panels import Dash, Line, Panel, draw_panels
from experiments.reporting.quantities import (
    TIMES,
    byte_unit,
    count,
    counted,
    show,
    size,
    time_unit,
)
from experiments.reporting.runs import Floats, Run, assigned_unit

SMALL = 1.55
SMOOTH_FROM = 200

ACCURACIES = (
    ("eval/personal_accuracy", "personal", GREEN),
    ("eval/server_accuracy", "server", INK),
    ("eval/global_accuracy", "global", PINK),
)
BALANCES = (
    ("load/assigned_cv", "assigned", ASSIGNED),
    ("load/usage_cv", "used", USED),
    ("load/assigned_cv_cumulative", "assigned", ASSIGNED),
    ("load/usage_cv_cumulative", "used", USED),
)


_SIMULATED = ("time/simulated_seconds",)
_BYTES = ("comm/bytes_down", "comm/bytes_up")


@dataclass(frozen=True)
class Pen:
    """How one of several runs is drawn everywhere: its letter, colour and dash."""

    letter: str
    colour: str
    dash: Dash


def pens(runs: int) -> list[Pen]:
    """One pen a run; colours repeat with another dash."""
    colours = len(ink.CYCLE)
    return [
        Pen(
            letter=chr(ord("A") + i) if i < 26 else str(i + 1),
            colour=ink.CYCLE[i % colours],
            dash=ink.DASHES[i // colours % len(ink.DASHES)],
        )
        for i in range(runs)
    ]


def run_pictures(run: Run) -> list[Picture]:
    """The curves of one run; what was not recorded has no picture."""
    made = [_accuracy(run), _loss(run), _balance(run), _traffic(run), _edge(run), _cost(run)]
    return [picture for picture in made if picture is not None]


def overlay_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The same curves with several runs in each, in the order and with the letters of `pens`."""

    def panel(key: str, title: str, kind: str = "linear") -> Panel:
        noisy = not key.endswith("_cumulative")
        lines = [
            Line(
                *(_calm(*run.series(key)) if noisy else run.series(key)),
                pen.letter,
                pen.colour,
                pen.dash,
            )
            for run, pen in zip(runs, pens(len(runs)), strict=True)
        ]
        return Panel(title, lines, kind)

    letters = "Each line is a run, drawn and lettered as in the list above"
    smoothed = _smoothing_remark(runs)
    traffic = [run.cumulative("comm/bytes_down", "comm/bytes_up") for run in runs]
    factor, unit = byte_unit(max((y[-1] for _, y in traffic if y.size), default=0.0))
    sent = [
        Line(x, y / factor, pen.letter, pen.colour, pen.dash)
        for (x, y), pen in zip(traffic, pens(len(runs)), strict=True)
    ]
    reached = [
        Line(np.interp(x, *total) / factor, y, pen.letter, pen.colour, pen.dash)
        for run, total, pen in zip(runs, traffic, pens(len(runs)), strict=True)
        for x, y in [run.series("eval/personal_accuracy")]
        if x.size and total[0].size
    ]
    made = [
        draw_panels(
            "accuracy",
            "Accuracy",
            [
                panel(key, f"{word.capitalize()} accuracy, %", "percent")
                for key, word, _ in ACCURACIES
            ],
            f"{letters}; higher is better, and all three panels share one scale.",
            shared=True,
        ),
        draw_panels(
            "balance",
            "Balance of the experts' load",
            [
                panel(key, f"{word.capitalize()} load CV, {span}", "log")
                for (key, word, _), span in zip(
                    BALANCES, ("per round", "per round", "cumulative", "cumulative"), strict=True
                )
            ],
            f"{letters}; 0 is perfectly even, lower is better{smoothed}.",
            columns=2,
            shared=True,
        ),
        draw_panels(
            "loss",
            "Training loss and traffic",
            [
                panel("train/loss", "Training loss", "positive"),
                Panel(f"Sent both ways, cumulative, {unit}", sent, "positive"),
                Panel("Personal accuracy, %", reached, "percent", f"{unit} sent both ways"),
            ],
            f"{letters}; in the last panel the line furthest up and left gets most out of a byte"
            f"{smoothed}.",
        ),
    ]
    made.append(_paid(runs, letters))
    return [picture for picture in made if picture is not None]


def _paid(runs: Sequence[Run], letters: str) -> Picture | None:
    """What accuracy cost: against simulated time, where devices were simulated, and bytes."""
    accuracy = "eval/global_accuracy"
    panels: list[Panel] = []
    for keys, kind in ((_SIMULATED, "time"), (_BYTES, "bytes")):
        totals = [run.cumulative(*keys) for run in runs]
        largest = max((y[-1] for _, y in totals if y.size), default=0.0)
        if not largest:
            continue
        factor, unit = time_unit(largest) if kind == "time" else byte_unit(largest)
        lines = [
            Line(np.interp(x, *total) / factor, y, pen.letter, pen.colour, pen.dash)
            for run, total, pen in zip(runs, totals, pens(len(runs)), strict=True)
            for x, y in [run.series(accuracy)]
            if x.size and total[0].size
        ]
        below = f"simulated {unit}" if kind == "time" else f"{unit} sent both ways"
        panels.append(Panel("Global accuracy, %", lines, "percent", below))
    if len(panels) < 2:
        return None
    return draw_panels(
        "paid",
        "What accuracy costs on these devices",
        panels,
        f"{letters}; the line furthest up and left gets most out of a second or a byte. Simulated "
        "time is that of the devices and links, not of this machine.",
        shared=True,
    )


def _accuracy(run: Run) -> Picture | None:
    lines = [Line(*run.series(key), word, colour) for key, word, colour in ACCURACIES]
    evaluated = run.final("eval/clients")
    who = f" The last evaluation counted {counted(evaluated, 'client')}." if evaluated else ""
    return draw_panels(
        "accuracy",
        "Accuracy",
        [Panel("Test accuracy, %", lines, "percent")],
        "Personal: each client on its own mix of labels; global: each client on the whole test "
        f"set; server: all clients' joint prediction. Higher is better.{who}",
        alt="; ".join(f"{w} {show(k, run.final(k))}" for k, w, _ in ACCURACIES),
    )


def _loss(run: Run) -> Picture | None:
    x, y = run.series("train/loss")
    return draw_panels(
        "loss",
        "Training loss",
        [Panel("Mean training loss", _with_trend(x, y, "", ASSIGNED), "positive")],
        "Mean over the examples that the round's clients trained on; lower is better"
        f"{_smoothing_remark([run])}.",
        alt=f"last value {show('train/loss', run.final('train/loss'))}",
    )


def _balance(run: Run) -> Picture | None:
    each = [
        line
        for key, word, colour in BALANCES[:2]
        for line in _with_trend(*run.series(key), word, colour)
    ]
    totals = [Line(*run.series(key), word, colour) for key, word, colour in BALANCES[2:]]
    return draw_panels(
        "balance",
        "Balance over time",
        [
            Panel("CV of the experts' load, each round alone", each, "log"),
            Panel("CV of the experts' load, cumulative", totals, "log"),
        ],
        "Coefficient of variation (standard deviation over mean) across experts: 0 is perfectly "
        f"even; assigned counts an expert's {assigned_unit(run)}, "
        f"used the samples that gates sent it{_smoothing_remark([run])}.",
        shared=True,
        alt="; ".join(f"{word} {show(key, run.final(key))}" for key, word, _ in BALANCES[2:]),
    )


def _traffic(run: Run) -> Picture | None:
    down, up = run.cumulative("comm/bytes_down"), run.cumulative("comm/bytes_up")
    totals = [y[-1] for _, y in (down, up) if y.size]
    factor, unit = byte_unit(max(totals, default=0.0))
    lines = [
        Line(down[0], down[1] / factor, "to clients", ASSIGNED),
        Line(up[0], up[1] / factor, "to server", USED, ink.DASHES[1]),
    ]
    return draw_panels(
        "communication",
        "Communication",
        [Panel(f"Bytes sent, cumulative, {unit}", lines, "positive")],
        "Everything sent so far between server and clients, over all clients; a steeper line is "
        f"a costlier round. Both ways together: {size(sum(totals))}.",
        height=2 * SMALL,
        alt=f"{size(sum(totals))} in all",
    )


def _edge(run: Run) -> Picture | None:
    """Who took part, and simulated time; nothing where everybody always delivered at once."""
    asked, delivered = run.series("clients/asked")[1], run.series("clients/delivered")[1]
    refused, simulated = run.series("clients/quarantined")[1], run.cumulative(*_SIMULATED)
    if np.array_equal(asked, delivered) and not refused.any() and not simulated[0].size:
        return None
    clients = [
        Line(*run.series(key), word, colour, dash)
        for key, word, colour, dash in (
            ("clients/asked", "asked", INK, ink.DASHES[1]),
            ("clients/delivered", "delivered", GREEN, ink.DASHES[0]),
            ("clients/quarantined", "refused", PINK, ink.DASHES[0]),
        )
    ]
    panels = [Panel("Clients in a round", clients, "positive")]
    if simulated[0].size:
        factor, unit = time_unit(simulated[1][-1])
        lines = [Line(simulated[0], simulated[1] / factor, "", INK)]
        panels.append(Panel(f"Simulated {unit}, cumulative", lines, "positive"))
    return draw_panels(
        "edge",
        "Clients and links",
        panels,
        "Clients that the server asked, those whose work arrived, and of these the ones whose "
        "update was refused for not being numbers or being too long.",
        alt=f"{counted(delivered.sum(), 'update')} of {count(asked.sum())} asked for arrived",
    )


def _cost(run: Run) -> Picture | None:
    def panel(key: str, title: str, factor: float, colour: str) -> Panel:
        x, y = run.series(key)
        # The first round compiles and loads the solver: it would flatten all others.
        warm = slice(int("second" in key and x.size > 2), None)
        return Panel(title, _with_trend(x[warm], y[warm] * factor, "", colour), "positive")

    gaps = run.series("assignment/gap")[1]
    largest = float(np.max(gaps[np.isfinite(gaps)], initial=0.0))
    factor, unit = (1.0, "") if largest >= 0.01 or not largest else (1e3, f", {TIMES}10⁻³")
    if 0 < largest < 1e-5:
        factor, unit = 1e6, f", {TIMES}10⁻⁶"
    states = Counter(str(r["assignment/status"]) for r in run.records if "assignment/status" in r)
    said = ", ".join(f"{state} in {counted(n, 'round')}" for state, n in states.most_common())
    return draw_panels(
        "cost",
        "What a round costs",
        [
            panel("assignment/solve_seconds", "Assignment, ms", 1e3, INK),
            panel("assignment/gap", f"Gap to the bound{unit}", factor, PINK),
            panel("time/round_seconds", "Whole round, s", 1, INK),
            panel("time/train_examples_per_second", "Training, examples / s", 1, GREEN),
        ],
        "Time spent on the assignment, its distance from the best possible value (0 is optimal), "
        "wall time of a round and training speed, these without the first round, which compiles"
        f"{_smoothing_remark([run])}." + (f" Solver: {said}." if said else ""),
        columns=2,
        height=SMALL,
        wide=False,
        alt=said or "no solver status recorded",
    )


def _window(points: int) -> int:
    """Rounds in the running mean: an odd number near a fortieth of the run."""
    return points // 40 | 1


def _smoothing_remark(runs: Sequence[Run]) -> str:
    longest = max((run.rounds for run in runs), default=0)
    if longest <= SMOOTH_FROM:
        return ""
    mean = f"running mean over {_window(longest)} rounds"
    return f"; pale each round, strong the {mean}" if len(runs) == 1 else f"; lines show the {mean}"


def _calm(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The curve, or its centred running mean where it has too many points to be read."""
    if x.size <= SMOOTH_FROM:
        return x, y
    kernel = np.ones(_window(x.size))
    weight = np.convolve(np.isfinite(y), kernel, "same")
    total = np.convolve(np.where(np.isfinite(y), y, 0.0), kernel, "same")
    mean = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return x, mean


def _with_trend(x: Floats, y: Floats, label: str, colour: str) -> list[Line]:
    """The curve itself, and in front of a crowded one its running mean."""
    if x.size <= SMOOTH_FROM:
        return [Line(x, y, label, colour)]
    return [Line(x, y, "", colour, strength=0.3), Line(*_calm(x, y), label, colour)]

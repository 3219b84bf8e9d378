"""Line charts over the rounds of one run: accuracy, loss, balance, traffic, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.reporting import style
from experiments.reporting.line_charts import HEIGHT, Dash, Grid, Line, Panel, draw_panels
from experiments.reporting.quantities import (
    byte_unit,
    count,
    counted,
    power_of_ten,
    show,
    size,
    time_unit,
)
from experiments.reporting.runs import Floats, Run, assigned_unit
from experiments.reporting.style import (
    AMBER,
    ASSIGNED,
    GREEN,
    INK,
    PINK,
    PURPLE,
    SKY,
    USED,
    Picture,
)

SMALL = 1.55
SMOOTH_FROM = 200

_COLOURS = {
    "personal": GREEN,
    "server": INK,
    "global": PINK,
    "assembled": AMBER,
    "tuned": PURPLE,
    "newcomer": SKY,
}
_WORDS = {"tuned": "fine-tuned", "newcomer": "newcomers"}
_ALL = ("assembled", "tuned", "newcomer")
BALANCES = (
    ("load/assigned_cv", "assigned", ASSIGNED),
    ("load/usage_cv", "used", USED),
    ("load/assigned_cv_cumulative", "assigned", ASSIGNED),
    ("load/usage_cv_cumulative", "used", USED),
)
SIMULATED = ("time/simulated_seconds",)


def models(measure: str, *further: str) -> list[tuple[str, str, str]]:
    """Returns the metric, word and colour of each kind of model: the three main ones, and more."""
    kinds = ("personal", "server", "global", *further)
    return [(f"eval/{kind}_{measure}", _WORDS.get(kind, kind), _COLOURS[kind]) for kind in kinds]


@dataclass(frozen=True)
class Pen:
    """How one of several runs is drawn in all pictures: its letter, colour and dash."""

    letter: str
    colour: str
    dash: Dash


def pens(runs: int) -> list[Pen]:
    """Returns one pen for each run; colours repeat with another dash."""
    colours = len(style.CYCLE)
    return [
        Pen(
            letter=chr(ord("A") + i) if i < 26 else str(i + 1),
            colour=style.CYCLE[i % colours],
            dash=style.DASHES[i // colours % len(style.DASHES)],
        )
        for i in range(runs)
    ]


def run_pictures(run: Run) -> list[Picture]:
    """Draws the curves of one run; metrics that were not recorded have no picture."""
    made = [_accuracy(run), _loss(run), _balance(run), _traffic(run), _edge(run), _cost(run)]
    return [picture for picture in made if picture is not None]


def _accuracy(run: Run) -> Picture | None:
    shown = models("accuracy", *_ALL)
    evaluated = run.final("eval/clients")
    who = f" The last evaluation counted {counted(evaluated, 'client')}." if evaluated else ""
    return draw_panels(
        "accuracy",
        "Accuracy",
        [Panel("Test accuracy, %", _lines(run, shown), "percent")],
        f"{_on_what(run)} Higher is better.{who}",
        alt=_finals(run, shown),
    )


def _loss(run: Run) -> Picture | None:
    x, y = run.series("train/loss")
    shown = models("loss", *_ALL)
    tested = _finals(run, shown)
    below = ", below over the test set" if tested else ""
    unit = run.loss_unit
    return draw_panels(
        "loss",
        "Loss",
        [
            Panel(
                unit.titled("Mean training loss"),
                _with_trend(x, y / unit.nats, "", ASSIGNED),
            ),
            Panel(unit.titled("Mean test loss"), _lines(run, shown, unit.nats)),
        ],
        "Mean over the units (pictures, or tokens) that the round's clients trained on"
        f"{below}; lower is better{smoothing_remark([run])}.",
        Grid(columns=1, height=SMALL if tested else HEIGHT, wide=False),
        alt=f"last value {show('train/loss', run.final('train/loss'), unit)}"
        + (f"; on the test set {tested}" if tested else ""),
    )


def _lines(run: Run, shown: Sequence[tuple[str, str, str]], unit: float = 1.0) -> list[Line]:
    found = [(*run.series(key), word, colour) for key, word, colour in shown]
    return [Line(x, y / unit, word, colour) for x, y, word, colour in found]


def _finals(run: Run, shown: Sequence[tuple[str, str, str]]) -> str:
    known = [(key, word) for key, word, _ in shown if run.series(key)[0].size]
    return "; ".join(f"{word} {show(key, run.final(key), run.loss_unit)}" for key, word in known)


def _on_what(run: Run) -> str:
    """Describes on which data each accuracy is measured."""
    with_prior = run.config.get("eval.prior") and run.task == "classification"
    prior = ", whose label shares it adds to what it predicts" if with_prior else ""
    one = ""
    if run.series("eval/assembled_accuracy")[0].size:
        one = " assembled: all experts in one model, which no client holds;"
    new = ""
    if run.config.get("eval.fine_tune"):
        new = "; fine-tuned: each client on what is its own, after one more round for itself alone"
        if with_prior and not run.config.get("local.prior"):
            new += ", which teaches it its label shares, so that none are added"
    if newcomers := run.final("eval/newcomer_clients"):
        new += f"; newcomers: {counted(newcomers, 'client')} without training, each on its own"
    return (
        f"Personal: each client on what is its own{prior}; global: each client on the whole test "
        f"set;{one} server: all clients' joint "
        f"prediction{new}."
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
        f"used the {run.units} that gates sent it{smoothing_remark([run])}.",
        Grid(shared=True),
        alt="; ".join(f"{word} {show(key, run.final(key))}" for key, word, _ in BALANCES[2:]),
    )


def _traffic(run: Run) -> Picture | None:
    down, up = run.cumulative("comm/bytes_down"), run.cumulative("comm/bytes_up")
    totals = [y[-1] for _, y in (down, up) if y.size]
    factor, unit = byte_unit(max(totals, default=0.0))
    lines = [
        Line(down[0], down[1] / factor, "to clients", ASSIGNED),
        Line(up[0], up[1] / factor, "to server", USED, style.DASHES[1]),
    ]
    return draw_panels(
        "communication",
        "Communication",
        [Panel(f"Bytes sent, cumulative, {unit}", lines, "positive")],
        "Everything sent so far between server and clients, over all clients; a steeper line is "
        f"a costlier round. Both ways together: {size(sum(totals))}.",
        Grid(height=2 * SMALL),
        alt=f"{size(sum(totals))} in all",
    )


def _edge(run: Run) -> Picture | None:
    """Draws the number of clients that took part, and simulated time.

    None if every client always delivered, no update was refused and no time was simulated.
    """
    asked, delivered = run.series("clients/asked")[1], run.series("clients/delivered")[1]
    refused, simulated = run.series("clients/quarantined")[1], run.cumulative(*SIMULATED)
    if np.array_equal(asked, delivered) and not refused.any() and not simulated[0].size:
        return None
    clients = [
        Line(*run.series(key), word, colour, dash)
        for key, word, colour, dash in (
            ("clients/asked", "asked", INK, style.DASHES[1]),
            ("clients/delivered", "delivered", GREEN, style.DASHES[0]),
            ("clients/quarantined", "refused", PINK, style.DASHES[0]),
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
    # The first round compiles and loads the solver: its time would flatten all others.
    cold = int(run.series("time/round_seconds")[0].size > 2)

    def panel(key: str, title: str, factor: float, colour: str) -> Panel:
        x, y = run.series(key)
        warm = slice(cold if "second" in key else 0, None)
        return Panel(title, _with_trend(x[warm], y[warm] * factor, "", colour), "positive")

    gaps = run.series("assignment/gap")[1]
    largest = float(np.max(gaps[np.isfinite(gaps)], initial=0.0))
    factor, unit = power_of_ten(largest)
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
        "wall time of a round and training speed"
        + (", times without the first round, which compiles" if cold else "")
        + f"{smoothing_remark([run])}."
        + (f" Solver: {said}." if said else ""),
        Grid(columns=2, height=SMALL, wide=False),
        alt=said or "no solver status recorded",
    )


def _window(points: int) -> int:
    """Returns the length of the running mean: an odd number near a fortieth of the points."""
    return points // 40 | 1


def smoothing_remark(runs: Sequence[Run]) -> str:
    """Returns a remark for the caption if a run is so long that lines are running means."""
    longest = max((run.rounds for run in runs), default=0)
    if longest <= SMOOTH_FROM:
        return ""
    mean = "the running mean over a fortieth of them"
    if len(runs) == 1:
        return f"; of more than {SMOOTH_FROM} rounds, pale each, strong {mean}"
    return f"; a line over more than {SMOOTH_FROM} single rounds is {mean}"


def calm(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Returns the curve, or its centred running mean if it has too many points to be readable."""
    if x.size <= SMOOTH_FROM:
        return x, y
    kernel = np.ones(_window(x.size))
    weight = np.convolve(np.isfinite(y), kernel, "same")
    total = np.convolve(np.where(np.isfinite(y), y, 0.0), kernel, "same")
    mean = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return x, mean


def _with_trend(x: Floats, y: Floats, label: str, colour: str) -> list[Line]:
    """Returns the line of a curve; if it has many points, a pale line and its running mean."""
    if x.size <= SMOOTH_FROM:
        return [Line(x, y, label, colour)]
    return [Line(x, y, "", colour, strength=0.3), Line(*calm(x, y), label, colour)]

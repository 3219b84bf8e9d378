"""Curves over the rounds as in `curves`, with several runs in each picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.reporting.curves import (
    BALANCES,
    SIMULATED,
    calm,
    models,
    pens,
    smoothing_remark,
)
from experiments.reporting.line_charts import Grid, Line, Panel, draw_panels
from experiments.reporting.quantities import LossUnit, byte_unit, time_unit
from experiments.reporting.runs import Floats, Run, common_unit
from experiments.reporting.style import Picture

_BYTES = ("comm/bytes_down", "comm/bytes_up")
_LETTERS = "Each line is a run, drawn and lettered as in the list above"


def overlay_pictures(runs: Sequence[Run]) -> list[Picture]:
    """Draws the curves of several runs together, in the order and with the letters of `pens`."""
    told_in = common_unit(runs)
    one_scale = f"all panels share one scale{smoothing_remark(runs)}."
    made = [
        draw_panels(
            "accuracy",
            "Accuracy",
            [
                _panel(runs, key, f"{word.capitalize()} accuracy, %", "percent")
                for key, word, _ in models("accuracy", "newcomer")
            ],
            f"{_LETTERS}; higher is better, and {one_scale}",
            Grid(shared=True),
        ),
        draw_panels(
            "test-loss",
            "Test loss",
            [
                _loss(runs, key, f"{word.capitalize()} loss", told_in)
                for key, word, _ in models("loss", "newcomer")
            ],
            f"{_LETTERS}; lower is better, and {one_scale}",
            Grid(shared=True),
        ),
        _balance(runs),
        _traffic(runs, told_in),
        _paid(runs),
    ]
    return [picture for picture in made if picture is not None]


def _panel(
    runs: Sequence[Run], key: str, title: str, kind: str = "linear", factor: float = 1.0
) -> Panel:
    """Returns a panel with one metric of all runs; its values are divided by `factor`."""
    noisy = not key.endswith("_cumulative")
    found = [calm(*run.series(key)) if noisy else run.series(key) for run in runs]
    lines = [
        Line(x, y / factor, pen.letter, pen.colour, pen.dash)
        for (x, y), pen in zip(found, pens(len(runs)), strict=True)
    ]
    return Panel(title, lines, kind)


def _loss(runs: Sequence[Run], key: str, words: str, told_in: LossUnit) -> Panel:
    return _panel(runs, key, told_in.titled(words), factor=told_in.nats)


def _against(
    runs: Sequence[Run], totals: Sequence[tuple[Floats, Floats]], factor: float, key: str
) -> list[Line]:
    """Returns lines of one metric of all runs against a running total, divided by `factor`."""
    return [
        Line(np.interp(x, *total) / factor, y, pen.letter, pen.colour, pen.dash)
        for run, total, pen in zip(runs, totals, pens(len(runs)), strict=True)
        for x, y in [run.series(key)]
        if x.size and total[0].size
    ]


def _balance(runs: Sequence[Run]) -> Picture | None:
    spans = ("per round", "per round", "cumulative", "cumulative")
    return draw_panels(
        "balance",
        "Balance of the experts' load",
        [
            _panel(runs, key, f"{word.capitalize()} load CV, {span}", "log")
            for (key, word, _), span in zip(BALANCES, spans, strict=True)
        ],
        f"{_LETTERS}; 0 is perfectly even, lower is better{smoothing_remark(runs)}.",
        Grid(columns=2, shared=True),
    )


def _traffic(runs: Sequence[Run], told_in: LossUnit) -> Picture | None:
    totals = [run.cumulative(*_BYTES) for run in runs]
    factor, unit = byte_unit(max((y[-1] for _, y in totals if y.size), default=0.0))
    sent = [
        Line(x, y / factor, pen.letter, pen.colour, pen.dash)
        for (x, y), pen in zip(totals, pens(len(runs)), strict=True)
    ]
    reached = _against(runs, totals, factor, "eval/personal_accuracy")
    return draw_panels(
        "loss",
        "Training loss and traffic",
        [
            _loss(runs, "train/loss", "Training loss", told_in),
            Panel(f"Sent both ways, cumulative, {unit}", sent, "positive"),
            Panel("Personal accuracy, %", reached, "percent", f"{unit} sent both ways"),
        ],
        f"{_LETTERS}; in the last panel the line furthest up and left gets most out of a byte"
        f"{smoothing_remark(runs)}.",
    )


def _paid(runs: Sequence[Run]) -> Picture | None:
    """Draws accuracy against simulated time and against bytes; None without simulated devices."""
    panels: list[Panel] = []
    for keys, kind in ((SIMULATED, "time"), (_BYTES, "bytes")):
        totals = [run.cumulative(*keys) for run in runs]
        largest = max((y[-1] for _, y in totals if y.size), default=0.0)
        if not largest:
            continue
        factor, unit = time_unit(largest) if kind == "time" else byte_unit(largest)
        lines = _against(runs, totals, factor, "eval/global_accuracy")
        below = f"simulated {unit}" if kind == "time" else f"{unit} sent both ways"
        panels.append(Panel("Global accuracy, %", lines, "percent", below))
    if len(panels) < 2:
        return None
    return draw_panels(
        "paid",
        "What accuracy costs on these devices",
        panels,
        f"{_LETTERS}; the line furthest up and left gets most out of a second or a byte. Simulated "
        "time is that of the devices and links, not of this machine.",
        Grid(shared=True),
    )

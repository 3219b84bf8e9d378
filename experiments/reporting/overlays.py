"""The same pictures of what changes from round to round with several runs in each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.reporting.curves import (
    ACCURACIES,
    BALANCES,
    LOSSES,
    NEWCOMERS,
    NEWCOMERS_LOSS,
    SIMULATED,
    calm,
    pens,
    smoothing_remark,
)
from experiments.reporting.ink import Picture
from experiments.reporting.panels import Line, Panel, draw_panels
from experiments.reporting.quantities import byte_unit, time_unit
from experiments.reporting.runs import Run, common_unit

_BYTES = ("comm/bytes_down", "comm/bytes_up")


def overlay_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The same curves with several runs in each, in the order and with the letters of `pens`."""

    def panel(key: str, title: str, kind: str = "linear", factor: float = 1.0) -> Panel:
        noisy = not key.endswith("_cumulative")
        found = [calm(*run.series(key)) if noisy else run.series(key) for run in runs]
        lines = [
            Line(x, y / factor, pen.letter, pen.colour, pen.dash)
            for (x, y), pen in zip(found, pens(len(runs)), strict=True)
        ]
        return Panel(title, lines, kind)

    def loss(key: str, words: str) -> Panel:
        return panel(key, told_in.titled(words), factor=told_in.nats)

    told_in = common_unit(runs)

    letters = "Each line is a run, drawn and lettered as in the list above"
    smoothed = smoothing_remark(runs)
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
                for key, word, _ in (*ACCURACIES, NEWCOMERS)
            ],
            f"{letters}; higher is better, and all panels share one scale.",
            shared=True,
        ),
        draw_panels(
            "test-loss",
            "Test loss",
            [loss(key, f"{word.capitalize()} loss") for key, word, _ in (*LOSSES, NEWCOMERS_LOSS)],
            f"{letters}; lower is better, and all panels share one scale.",
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
                loss("train/loss", "Training loss"),
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
    for keys, kind in ((SIMULATED, "time"), (_BYTES, "bytes")):
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

"""The page of a study: tables and pictures over all its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.reporting.curves import Pen, pens
from experiments.reporting.fill import fill
from experiments.reporting.page import legend
from experiments.reporting.quantities import counted
from experiments.reporting.style import Picture
from experiments.reporting.tables import Table
from experiments.studying import pictures
from experiments.studying.results import Results
from experiments.studying.rows import Row, differences, read_rows
from experiments.studying.sheets import TARGET, sheets_of


def render_study(results: Results, target: float = TARGET, reference: str = "") -> str:
    """Renders the page of a study, finished or not.

    Args:
      results: runs of the study.
      target: client-global accuracy up to which rounds and bytes are counted.
      reference: method that all others are compared with; empty for the study's choice.
    """
    reference = results.reference(reference)
    rows = read_rows(results, target)
    letters = dict(zip(results.methods, pens(len(results.methods)), strict=True))
    done = len(results.results) - len(results.missing)
    counts = (
        counted(len(results.methods), "method"),
        counted(len(results.tasks), "task"),
        counted(len(results.seeds), "seed"),
    )
    return fill(
        "study.html",
        title=results.name,
        lead=f"{done} of {counted(len(results.results), 'run')} finished · {' · '.join(counts)}",
        notes=[*_missing(results), *results.notes],
        lines=legend(results.methods, list(letters.values())),
        tasks=[
            _values(results, [row for row in rows if row.task == task], letters, target, reference)
            for task in results.tasks
        ],
    )


def _values(
    results: Results,
    rows: Sequence[Row],
    letters: Mapping[str, Pen],
    target: float,
    reference: str,
) -> dict[str, Any]:
    """Returns what the template shows of a data set and partition, whose rows these are."""
    variants: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        variants.setdefault(row.variant, []).append(row)
    return {
        "title": " · ".join(rows[0].task),
        "along_axes": _along_axes(results, rows, letters),
        "variants": [
            {
                "title": ", ".join(f"{a} {n}" for a, n in zip(results.axes, variant, strict=True)),
                "pictures": _pictures(results, some, letters, reference),
            }
            for variant, some in variants.items()
        ],
        "tables": [_untitled(table) for table in sheets_of(rows, results.axes, target, reference)],
    }


def _untitled(table: Table) -> Table:
    """Removes data set and partition from the title, as the page has them above."""
    title = table.title.rpartition(": ")[2]
    return replace(table, title=title[:1].upper() + title[1:])


def _pictures(
    results: Results, rows: Sequence[Row], letters: Mapping[str, Pen], reference: str
) -> list[Picture]:
    """Draws the pictures of one variant of one task."""
    runs = results.of(rows[0].task)
    comparable = any(row.values("mean/final") for row in rows)
    key, what = (
        ("mean/final", "Mean of the three accuracies")
        if comparable
        else ("personal/final", "Personal accuracy")
    )
    compared = zip(rows, differences(rows, reference, key), strict=True)
    made = [
        *pictures.curves(
            {row.method: list(runs[row.variant, row.method].values()) for row in rows},
            letters,
            rows[0].unit,
        ),
        pictures.balance_bars(rows),
        pictures.trade_off(rows, letters),
        pictures.forest(
            {row.method: difference for row, difference in compared if difference is not None},
            reference,
            letters,
            what,
        ),
    ]
    return [picture for picture in made if picture is not None]


def _along_axes(results: Results, rows: Sequence[Row], letters: Mapping[str, Pen]) -> list[Picture]:
    """Draws accuracy against the further axis, if the study has exactly one."""
    if len(results.axes) != 1:
        return []
    names = list(dict.fromkeys(row.variant[0] for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.seeds:
            found.setdefault(row.method, {})[row.variant[0]] = row
    picture = pictures.along_axis(results.axes[0], names, found, letters)
    return [] if picture is None else [picture]


def _missing(results: Results) -> list[str]:
    """Returns a sentence on the runs that are not finished, if there are any."""
    if not results.missing:
        return []
    names = ", ".join(f"{r.trial.name} ({r.status})" for r in results.missing[:10])
    more = len(results.missing) - 10
    rest = f" and {more} more; table.md lists them all" if more > 0 else ""
    return [f"Not finished: {names}{rest}."]

"""Puts the numbers, tables and pictures of runs on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.reporting import tables
from experiments.reporting.curves import Pen, pens, run_pictures
from experiments.reporting.fill import fill
from experiments.reporting.heat_maps import client_pictures, load_pictures
from experiments.reporting.overlays import overlay_pictures
from experiments.reporting.runs import Run, different_data, differing_fields, name_runs

# Each chapter of a run's pictures: its title, how it is drawn, and what stands there without any.
CHAPTERS = {
    "learning": ("Learning", run_pictures, "No round has been recorded yet."),
    "load": ("Load on the experts", load_pictures, "No expert load has been recorded yet."),
    "clients": (
        "Clients and their experts",
        client_pictures,
        "These pictures need arrays.npz, which is not there yet.",
    ),
}


def render(runs: Sequence[Run]) -> str:
    """Renders the page of one run, or a comparison of several runs and a section for each."""
    if len(runs) == 1:
        (run,) = runs
        return fill("run.html", title=run.workdir.resolve().name, run=_values(run, "run", ()))
    names, fields = name_runs(runs), differing_fields(runs)
    lines = legend(names, pens(len(runs)))
    return fill(
        "runs.html",
        title=f"{len(runs)} runs compared",
        lines=lines,
        comparison=tables.comparison(runs, names),
        differences=tables.differences(runs, [line["letter"] for line in lines], fields),
        notes=different_data(dict(zip(names, runs, strict=True))),
        overlays=overlay_pictures(runs),
        runs=[_values(run, f"run-{i}", fields) for i, run in enumerate(runs, start=1)],
    )


def legend(names: Sequence[str], drawn: Sequence[Pen]) -> list[dict[str, str]]:
    """Returns the letter and line style of each run or method."""
    return [
        {
            "name": name,
            "letter": pen.letter,
            "colour": pen.colour,
            "dashes": ""
            if isinstance(pen.dash, str)
            else " ".join(f"{2.2 * step:g}" for step in pen.dash[1]),
        }
        for name, pen in zip(names, drawn, strict=True)
    ]


def _values(run: Run, section: str, marked: Sequence[str]) -> dict[str, Any]:
    """Returns what the templates show of a run; fields in `marked` are highlighted."""
    return {
        "section": section,
        "status": run.status,
        "workdir": run.workdir,
        "setting": tables.setting(run),
        "tiles": tables.headline(run),
        "notes": run.notes,
        "chapters": [
            {"name": name, "title": title, "pictures": draw(run), "otherwise": otherwise}
            for name, (title, draw, otherwise) in CHAPTERS.items()
        ],
        "metrics": tables.values(run),
        "environment": tables.environment(run),
        "configuration": tables.configuration(run, marked),
        "marked": bool(marked),
    }

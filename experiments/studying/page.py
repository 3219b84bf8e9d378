"""The page of a study: tables and pictures over all its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.markup import html_text as escape
from experiments.reporting import tables
from experiments.reporting.curves import Pen, pens
from experiments.reporting.page import document, notes, show_pictures
from experiments.reporting.quantities import counted
from experiments.reporting.style import Picture
from experiments.studying import pictures
from experiments.studying.results import Results
from experiments.studying.rows import Row, differences, read_rows
from experiments.studying.sheets import (
    TARGET,
    Sheet,
    accuracy_sheet,
    cost_sheet,
    difference_sheet,
    loss_difference_sheet,
    loss_sheet,
)


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
    sections = {task: f"task-{i}" for i, task in enumerate(results.tasks, start=1)}
    done = len(results.results) - len(results.missing)
    links = [f'<a href="#{at}">{escape(" · ".join(t))}</a>' for t, at in sections.items()]
    parts = [
        f'<p class="eyebrow">FLEX-MoE study</p><h1>{escape(results.name)}</h1>',
        f'<p class="lead">{done} of {counted(len(results.results), "run")} finished · '
        f"{counted(len(results.methods), 'method')} · {counted(len(results.tasks), 'task')} · "
        f"{counted(len(results.seeds), 'seed')}</p>",
        _missing(results),
        notes(results.notes),
        tables.legend(results.methods, list(letters.values()), linked=False),
        f"<nav>{''.join(links)}</nav>",
    ]
    for task, section in sections.items():
        here = [row for row in rows if row.task == task]
        title = " · ".join(task)
        sheets = [
            accuracy_sheet(here, results.axes, title),
            difference_sheet(here, results.axes, title, reference),
            loss_sheet(here, results.axes, title),
            loss_difference_sheet(here, results.axes, title, reference),
            cost_sheet(here, results.axes, title, target),
        ]
        parts.append(f'<section class="run" id="{section}"><h2>{escape(title)}</h2>')
        parts.append(show_pictures(_along_axes(results, here, letters), section, "h4"))
        for i, variant in enumerate(dict.fromkeys(row.variant for row in here)):
            named = [f"{a} {n}" for a, n in zip(results.axes, variant, strict=True)]
            at = f"{section}-{i}" if named else section
            if named:
                parts.append(f"<h3>{escape(', '.join(named))}</h3>")
            some = [row for row in here if row.variant == variant]
            parts.append(show_pictures(_pictures(results, some, letters, reference), at, "h4"))
        parts += [_table(sheet) for sheet in sheets if sheet is not None]
        parts.append("</section>")
    return document(results.name, "\n".join(parts))


def _pictures(
    results: Results, rows: Sequence[Row], letters: dict[str, Pen], reference: str
) -> list[Picture]:
    """Draws the pictures of one variant of one task."""
    runs = results.of(rows[0].task)
    made = [
        *pictures.curves(
            {row.method: list(runs[row.variant, row.method].values()) for row in rows},
            letters,
            rows[0].unit,
        ),
        pictures.balance_bars(rows),
        pictures.trade_off(rows, letters),
        pictures.forest(
            {
                row.method: difference
                for row, difference in zip(
                    rows, differences(rows, reference, "mean/final"), strict=True
                )
                if difference is not None
            },
            reference,
            letters,
        ),
    ]
    return [picture for picture in made if picture is not None]


def _along_axes(results: Results, rows: Sequence[Row], letters: dict[str, Pen]) -> list[Picture]:
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


def _table(sheet: Sheet) -> str:
    def cell(text: str, tag: str, index: int) -> str:
        kind = "" if index < sheet.words else ' class="n"'
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    title = sheet.title.rpartition(": ")[2]
    head = "".join(cell(text, "th", i) for i, text in enumerate(sheet.heads))
    body = "".join(
        "<tr>" + "".join(cell(text, "td", i) for i, text in enumerate(row)) + "</tr>"
        for row in sheet.rows
    )
    return (
        f'<h3>{escape(title[:1].upper() + title[1:])}</h3><div class="scroll">'
        f"<table><caption>{escape(sheet.note)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _missing(results: Results) -> str:
    if not results.missing:
        return ""
    names = ", ".join(f"{r.trial.name} ({r.status})" for r in results.missing[:10])
    more = len(results.missing) - 10
    rest = f" and {more} more; table.md lists them all" if more > 0 else ""
    return f'<p class="note">Not finished: {escape(names)}{rest}.</p>'

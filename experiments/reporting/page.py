"""Puts the numbers, tables and pictures of runs on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.markup import html_text as escape
from experiments.reporting import tables
from experiments.reporting.curves import pens, run_pictures
from experiments.reporting.heat_maps import client_pictures, load_pictures
from experiments.reporting.overlays import overlay_pictures
from experiments.reporting.runs import Run, different_data, differing_fields, name_runs
from experiments.reporting.style import Picture

STYLE_SHEET = Path(__file__).with_name("page.css")
PIXELS_AN_INCH = 104
WIDE = ' class="wide"'


def render(runs: Sequence[Run]) -> str:
    """Renders the page of one run, or a comparison of several runs and a section for each."""
    if len(runs) == 1:
        (run,) = runs
        folder = run.workdir.resolve().name
        head = (
            f'<p class="eyebrow">FLEX-MoE training run</p>'
            f"<h1>{escape(folder)}{tables.chip(run)}</h1>{tables.setting(run)}"
        )
        return document(folder, head + _run_body(run, "run", "h3", ()))
    title = f"{len(runs)} runs compared"
    head = f'<p class="eyebrow">FLEX-MoE training runs</p><h1>{title}</h1>'
    return document(title, head + _comparison(runs))


def document(title: str, body: str) -> str:
    """Returns a complete HTML page with the given title and body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · flexmoe_jax</title>\n"
        f"<style>\n{STYLE_SHEET.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "<footer>Written by <code>python -m experiments.report</code>. CV: coefficient of "
        "variation, the standard deviation over the mean across experts.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _comparison(runs: Sequence[Run]) -> str:
    names = name_runs(runs)
    fields = differing_fields(runs)
    letters = [pen.letter for pen in pens(len(runs))]
    parts = [
        tables.legend(names, pens(len(runs))),
        tables.comparison(runs, names, letters),
        tables.differences(runs, letters, fields),
        notes(different_data(dict(zip(names, runs, strict=True)))),
        "<h3>Curves</h3>",
        show_pictures(overlay_pictures(runs), "all", "h4"),
    ]
    for i, (run, name, letter) in enumerate(zip(runs, names, letters, strict=True)):
        section = f"run-{i + 1}"
        parts.append(
            f'<section class="run" id="{section}"><h2><span class="letter">{letter}</span> '
            f"{escape(name)}{tables.chip(run)}</h2>"
            f'<p class="lead">{escape(str(run.workdir))}</p>{tables.setting(run)}'
            f"{_run_body(run, section, 'h3', fields)}</section>"
        )
    return "\n".join(parts)


def notes(sentences: Sequence[str]) -> str:
    """Formats the remarks that a reader should know before trusting the figures."""
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in sentences)


def _run_body(run: Run, section: str, heading: str, marked: Sequence[str]) -> str:
    chapters = [
        ("Learning", "learning", run_pictures(run), "No round has been recorded yet."),
        (
            "Load on the experts",
            "load",
            load_pictures(run),
            "No expert load has been recorded yet.",
        ),
        (
            "Clients and their experts",
            "clients",
            client_pictures(run),
            "These pictures need arrays.npz, which is not there yet.",
        ),
    ]
    links = [*((f"{section}-{key}", title) for title, key, _, _ in chapters)]
    links += [(f"{section}-values", "Values"), (f"{section}-config", "Configuration")]
    parts = [
        "<nav>" + "".join(f'<a href="#{at}">{title}</a>' for at, title in links) + "</nav>",
        tables.headline(run),
        notes(run.notes),
    ]
    for title, key, pictures, otherwise in chapters:
        parts.append(f'<{heading} id="{section}-{key}">{title}</{heading}>')
        parts.append(
            show_pictures(pictures, section, "h4")
            if pictures
            else f'<p class="lead">{escape(otherwise)}</p>'
        )
    parts.append(f'<{heading} id="{section}-values">Values and environment</{heading}>')
    parts.append(f'<div class="halves">{tables.values(run)}{tables.environment(run)}</div>')
    parts.append(f'<{heading} id="{section}-config">Configuration</{heading}>')
    parts.append(tables.configuration(run, marked))
    return "\n".join(parts)


def show_pictures(pictures: Sequence[Picture], section: str, heading: str) -> str:
    """Formats pictures side by side, each with its heading and caption."""
    figures = [
        f'<figure id="{section}-{p.name}"{WIDE * p.wide}>'
        f"<{heading}>{escape(p.title)}</{heading}>"
        f'<img src="{p.source}" alt="{escape(p.alt)}" width="{p.size[0] * PIXELS_AN_INCH:.0f}" '
        f'height="{p.size[1] * PIXELS_AN_INCH:.0f}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in pictures
    ]
    return '<div class="pictures">' + "\n".join(figures) + "</div>"

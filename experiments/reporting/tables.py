"""The parts of the page that consist of text and numbers: headline, tables, configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.markup import html_text as escape
from experiments.reporting import quantities
from experiments.reporting.curves import Pen
from experiments.reporting.quantities import NBSP, NOTHING, count, counted, duration, show, size
from experiments.reporting.runs import Run, json_text

HEADLINE = (
    ("eval/personal_accuracy", "Personal accuracy"),
    ("eval/global_accuracy", "Global accuracy"),
    ("eval/server_accuracy", "Server accuracy"),
    ("eval/tuned_accuracy", "Accuracy once fine-tuned"),
    ("eval/newcomer_accuracy", "Newcomers' accuracy"),
    ("eval/personal_loss", "Personal loss"),
    ("eval/tuned_loss", "Loss once fine-tuned"),
    ("eval/newcomer_loss", "Newcomers' loss"),
    ("load/assigned_cv_cumulative", "Assigned load CV, cumulative"),
    ("load/usage_cv_cumulative", "Used load CV, cumulative"),
)
COMPARED = (*HEADLINE, ("train/loss", "Training loss"))
# Columns that are shown only if some run has a value.
FURTHER = {
    f"eval/{word}_{measure}" for word in ("tuned", "newcomer") for measure in ("accuracy", "loss")
}
# Config fields that describe a run in one line, each with the text around its value.
SETTING = (
    ("data.name", "{}"),
    ("partition.name", "{} partition"),
    ("assignment.policy", "{} policy"),
    ("clients.count", "{} clients"),
    ("model.experts", "{} experts"),
    ("clients.capacity", "capacity {}"),
    ("model.backbone", "{}"),
    ("seed", "seed {}"),
)
# Entries of the summary that the page shows elsewhere, or in a row of their own.
PLACED = {"status", "rounds", "versions", "device", "seconds", "personal_measured_on", "notes"}
STATUSES = {"finished", "interrupted", "diverged"}
LONGEST_VALUE = 60
DIFFERS = ' class="differs"'


def chip(run: Run) -> str:
    """Formats the run's status as a small badge."""
    kind = run.status if run.status in STATUSES else ""
    return f' <span class="chip {kind}">{escape(run.status)}</span>'


def setting(run: Run) -> str:
    """Describes in one line which method was trained on which data."""
    said = [
        words.format(json_text(run.config[field]))
        for field, words in SETTING
        if field in run.config
    ]
    if isinstance(measured := run.summary.get("personal_measured_on"), str):
        said.append(f"personal figures on {measured}")
    return f'<p class="lead">{escape(" · ".join(said))}</p>' if said else ""


def headline(run: Run) -> str:
    """Formats the row of numbers at the top of a run's section."""
    tiles = []
    for key, words in HEADLINE:
        value = run.final(key)
        if value is not None:
            tiles.append((words, show(key, value, run.loss_unit), _beside(run, key)))
    total = _traffic(run)
    if total is not None:
        each = f"{size(total / run.rounds)} a round"
        tiles.append(("Bytes sent, both ways", size(total), each))
    seconds = run.seconds()
    if seconds is not None:
        tiles.append(("Wall time", duration(seconds), counted(_rounds(run), "round")))
    return _tiles(tiles)


def legend(names: Sequence[str], drawn: Sequence[Pen], linked: bool = True) -> str:
    """Lists the runs with the letter and line style of each, linked to their sections."""
    links = [f'<a href="#run-{i}">{escape(name)}</a>' for i, name in enumerate(names, start=1)]
    items = [
        f'<li><svg width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" '
        f'stroke="{pen.colour}" stroke-width="2.6"{_dash_array(pen)}/></svg>'
        f'<span class="letter">{pen.letter}</span> {link if linked else escape(name)}</li>'
        for name, link, pen in zip(names, links, drawn, strict=True)
    ]
    return f'<ul class="runs">{"".join(items)}</ul>'


def comparison(runs: Sequence[Run], names: Sequence[str], letters: Sequence[str]) -> str:
    """Formats a table of final values, one row for each run, with the best of each column bold."""
    finals = {key: [run.final(key) for run in runs] for key, _ in COMPARED}
    compared = [
        (key, words)
        for key, words in COMPARED
        if key not in FURTHER or any(value is not None for value in finals[key])
    ]
    columns = [finals[key] for key, _ in compared]
    # Losses of different tasks have different units: none of them is the best.
    one_task = len({run.task for run in runs}) == 1
    leaders = [
        _leader(key, finals[key]) if one_task or not quantities.is_loss(key) else None
        for key, _ in compared
    ]
    rows = []
    for i, run in enumerate(runs):
        cells = [
            (show(key, column[i], run.loss_unit), column[i] is not None and column[i] == leader)
            for (key, _), column, leader in zip(compared, columns, leaders, strict=True)
        ]
        total, seconds = _traffic(run), run.seconds()
        best = run.best("eval/personal_accuracy")
        cells.insert(1, (show("eval/personal_accuracy", best), False))
        cells += [
            (NOTHING if total is None else size(total), False),
            (NOTHING if seconds is None else duration(seconds), False),
            (count(_rounds(run)), False),
        ]
        row = "".join(f'<td class="n{" top" * top}">{escape(text)}</td>' for text, top in cells)
        rows.append(
            f'<tr><th scope="row"><span class="letter">{letters[i]}</span> {escape(names[i])}'
            f"{'' if run.status == 'finished' else chip(run)}</th>{row}</tr>"
        )
    titles = [words for _, words in compared]
    titles.insert(1, "Personal, best")
    titles += ["Bytes sent", "Wall time", "Rounds"]
    head = '<th scope="col">Run</th>' + "".join(
        f'<th scope="col" class="n">{t}</th>' for t in titles
    )
    return (
        '<h3>Final values</h3><div class="scroll"><table class="compared">'
        "<caption>Bold: the best of its column. Load CV: 0 is perfectly even.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def differences(runs: Sequence[Run], letters: Sequence[str], fields: Sequence[str]) -> str:
    """Formats a table of the config fields that differ: one row a field, one column a run."""
    if not fields:
        return '<h3>What differs</h3><p class="lead">The configurations are the same.</p>'
    head = '<th scope="col">Field</th>' + "".join(f'<th scope="col">{lt}</th>' for lt in letters)
    rows = "".join(
        f'<tr><th scope="row">{escape(field)}</th>'
        + "".join(f"<td>{escape(_config_text(run.config, field))}</td>" for run in runs)
        + "</tr>"
        for field in fields
    )
    return (
        f'<h3>What differs</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def values(run: Run) -> str:
    """Tabulates final and best value of every metric in the recorded rounds or the summary."""
    stated = [k.split("/", 1)[1] for k in run.summary if k.startswith(("final/", "best/"))]
    recorded = {k for r in run.records for k, v in r.items() if isinstance(v, int | float)}
    known = [key for key in quantities.QUANTITIES if key in recorded or key in stated]
    keys = dict.fromkeys([*known, *stated, *sorted(recorded - {"round"})])
    rows = []
    for key in keys:
        final, best, at = run.final(key), run.best(key), run.best_round(key)
        rows.append(
            f'<tr><th scope="row">{escape(quantities.name(key))}</th>'
            f'<td class="n">{escape(show(key, final, run.loss_unit))}</td>'
            f'<td class="n">{escape(show(key, best, run.loss_unit))}</td>'
            f'<td class="n">{NOTHING if at is None else f"{at:,}"}</td></tr>'
        )
    if not rows:
        return '<p class="lead">No value has been recorded yet.</p>'
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Metric</th>'
        '<th scope="col" class="n">Final</th><th scope="col" class="n">Best</th>'
        '<th scope="col" class="n">in round</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def environment(run: Run) -> str:
    """Tabulates status, device, wall time, versions and every other scalar of the summary."""
    rows: list[tuple[str, str]] = [("Status", run.status), ("Rounds", count(_rounds(run)))]
    seconds = run.seconds()
    if seconds is not None:
        rows.append(("Wall time", duration(seconds)))
    if "device" in run.summary:
        rows.append(("Device", json_text(run.summary["device"])))
    versions = run.summary.get("versions")
    if isinstance(versions, Mapping):
        rows += [(str(name), json_text(version)) for name, version in versions.items()]
    rows += [
        (key, _scalar_text(value))
        for key, value in run.summary.items()
        if key not in PLACED
        and not key.startswith(("final/", "best/", "total/"))
        and isinstance(value, str | int | float)
    ]
    rows.append(("Workdir", str(run.workdir)))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in rows
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Environment</th><th></th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def configuration(run: Run, marked: Sequence[str]) -> str:
    """Formats every config field, by section; those in `marked` are highlighted."""
    if not run.config:
        return '<p class="lead">config.json is not there.</p>'
    sections: dict[str, list[str]] = {}
    for field in run.config:
        sections.setdefault(field.rpartition(".")[0], []).append(field)
    parts = []
    for title, fields in sections.items():
        entries = "".join(
            f"<div{DIFFERS * (f in marked)}>"
            f"<dt>{escape(f.rpartition('.')[2])}</dt>"
            f"<dd>{escape(_config_text(run.config, f))}</dd></div>"
            for f in fields
        )
        parts.append(f"<section><h4>{escape(title or 'run')}</h4><dl>{entries}</dl></section>")
    note = '<p class="lead">Highlighted fields differ between the runs.</p>' if marked else ""
    return f'{note}<div class="config">{"".join(parts)}</div>'


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    if not tiles:
        return ""
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{escape(title)}</dt><dd>{escape(value)}"
            f"<small>{escape(small)}</small></dd></div>"
            for title, value, small in tiles
        )
        + "</dl>"
    )


def _beside(run: Run, key: str) -> str:
    """Returns the text beside a headline number: the best value and its round.

    For a cumulative metric it is the value of the last round alone.
    """
    if key.endswith("_cumulative"):
        alone = key.removesuffix("_cumulative")
        last = run.final(alone)
        return "" if last is None else f"last round alone {show(alone, last)}"
    best, at = run.best(key), run.best_round(key)
    where = "" if at is None else f", round{NBSP}{at:,}"
    return "" if best is None else f"best {show(key, best, run.loss_unit)}{where}"


def _traffic(run: Run) -> float | None:
    _, total = run.cumulative("comm/bytes_down", "comm/bytes_up")
    return float(total[-1]) if total.size else None


def _rounds(run: Run) -> float:
    stated = run.summary.get("rounds")
    return stated if isinstance(stated, int | float) else run.rounds


def _leader(key: str, column: Sequence[float | None]) -> float | None:
    numbers = [v for v in column if v is not None and math.isfinite(v)]
    if len(numbers) < 2:
        return None
    return max(numbers) if quantities.better(key) == "higher" else min(numbers)


def _config_text(config: Mapping[str, Any], field: str) -> str:
    if field not in config:
        return NOTHING
    text = json_text(config[field]) or '""'
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _scalar_text(value: str | float) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else json_text(value)


def _dash_array(pen: Pen) -> str:
    if isinstance(pen.dash, str):
        return ""
    return f' stroke-dasharray="{" ".join(f"{2.2 * step:g}" for step in pen.dash[1])}"'

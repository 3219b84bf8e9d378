"""Texts and numbers of the pages: headline, tables, configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.reporting import quantities
from experiments.reporting.quantities import NBSP, NOTHING, count, counted, duration, show, size
from experiments.reporting.runs import Run, json_text

PERSONAL = "eval/personal_accuracy"
HEADLINE = (
    (PERSONAL, "Personal accuracy"),
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
LONGEST_VALUE = 60


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
      heads: column heads; the first `words` columns hold words, the others numbers.
      rows: rows with one cell for each head.
      title: title of the table.
      note: how to read it.
      words: number of columns that hold words.
      best: (row, column) of the cells that are the best of their columns.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


class Tile(NamedTuple):
    """One number at the top of a run's section, with its title and what stands below it."""

    title: str
    value: str
    small: str


def setting(run: Run) -> str:
    """Describes in one line which method was trained on which data."""
    said = [
        words.format(json_text(run.config[field]))
        for field, words in SETTING
        if field in run.config
    ]
    if isinstance(measured := run.summary.get("personal_measured_on"), str):
        said.append(f"personal figures on {measured}")
    return " · ".join(said)


def headline(run: Run) -> list[Tile]:
    """Returns the numbers at the top of a run's section."""
    tiles = []
    for key, words in HEADLINE:
        value = run.final(key)
        if value is not None:
            tiles.append(Tile(words, show(key, value, run.loss_unit), _beside(run, key)))
    total = _traffic(run)
    if total is not None:
        each = f"{size(total / run.rounds)} a round"
        tiles.append(Tile("Bytes sent, both ways", size(total), each))
    seconds = run.seconds()
    if seconds is not None:
        tiles.append(Tile("Wall time", duration(seconds), counted(_rounds(run), "round")))
    return tiles


def comparison(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Tabulates final values, one row for each run."""
    compared = {
        key: words
        for key, words in COMPARED
        if key not in FURTHER or any(run.final(key) is not None for run in runs)
    }
    # Losses of different tasks have different units: none of them is the best.
    one_task = len({run.task for run in runs}) == 1
    # Head, cells, and the rows with the best of them.
    columns: list[tuple[str, list[str], set[int]]] = []
    for key, words in compared.items():
        values = [run.final(key) for run in runs]
        leader = _leader(key, values) if one_task or not quantities.is_loss(key) else None
        texts = [show(key, v, run.loss_unit) for run, v in zip(runs, values, strict=True)]
        top = {i for i, v in enumerate(values) if v is not None and v == leader}
        columns.append((words, texts, top))
    best = [show(PERSONAL, run.best(PERSONAL)) for run in runs]
    columns.insert(1, ("Personal, best", best, set()))
    sizes = [NOTHING if (total := _traffic(run)) is None else size(total) for run in runs]
    times = [NOTHING if (taken := run.seconds()) is None else duration(taken) for run in runs]
    columns += [("Bytes sent", sizes, set()), ("Wall time", times, set())]
    columns.append(("Rounds", [count(_rounds(run)) for run in runs], set()))
    return Table(
        ("Run", *(head for head, _, _ in columns)),
        list(zip(names, *(cells for _, cells, _ in columns), strict=True)),
        "Final values",
        "Bold: the best of its column. Load CV: 0 is perfectly even.",
        best=frozenset((i, at) for at, (_, _, top) in enumerate(columns, start=1) for i in top),
    )


def differences(runs: Sequence[Run], letters: Sequence[str], fields: Sequence[str]) -> Table:
    """Tabulates the config fields that differ: one row a field, one column a run."""
    rows = [(field, *(_config_text(run.config, field) for run in runs)) for field in fields]
    return Table(("Field", *letters), rows, "What differs", words=1 + len(letters))


def values(run: Run) -> Table:
    """Tabulates final and best value of every metric in the recorded rounds or the summary."""
    stated = [k.split("/", 1)[1] for k in run.summary if k.startswith(("final/", "best/"))]
    recorded = {k for r in run.records for k, v in r.items() if isinstance(v, int | float)}
    known = [key for key in quantities.QUANTITIES if key in recorded or key in stated]
    rows = []
    for key in dict.fromkeys([*known, *stated, *sorted(recorded - {"round"})]):
        both = [show(key, value, run.loss_unit) for value in (run.final(key), run.best(key))]
        at = run.best_round(key)
        rows.append((quantities.name(key), *both, NOTHING if at is None else f"{at:,}"))
    return Table(("Metric", "Final", "Best", "in round"), rows)


def environment(run: Run) -> Table:
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
    return Table(("Environment", ""), rows, words=2)


def configuration(run: Run, marked: Sequence[str]) -> dict[str, list[tuple[str, str, bool]]]:
    """Returns the config by section: name and value of each field, and whether `marked` has it."""
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for field in run.config:
        section, _, name = field.rpartition(".")
        entry = name, _config_text(run.config, field), field in marked
        sections.setdefault(section or "run", []).append(entry)
    return sections


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

"""Results of a study as rows: one row for each method on each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.reporting.quantities import LossUnit
from experiments.reporting.runs import Run, common_unit
from experiments.studying.results import Results, figures
from experiments.studying.statistics import Difference, holm, paired_difference


@dataclass(frozen=True)
class Row:
    """One method on one task: a row of every table.

    Attributes:
      task: data set and partition.
      variant: names on the further axes.
      method: name of the method.
      asked: number of seeds that the study asks for.
      seeds: seed to the numbers of `figures`, for the finished runs.
      unit: unit in which losses are shown.
    """

    task: tuple[str, str]
    variant: tuple[str, ...]
    method: str
    asked: int
    seeds: Mapping[int, Mapping[str, float]]
    unit: LossUnit

    def values(self, key: str) -> list[float]:
        """Returns the quantity `key` for all seeds that have it."""
        return [value for (value,) in self.points(key)]

    def points(self, *keys: str) -> list[tuple[float, ...]]:
        """Returns several quantities together, for all seeds that have every one of them."""
        return [
            tuple(found[key] for key in keys)
            for found in self.seeds.values()
            if all(key in found for key in keys)
        ]

    def against(self, reference: Row, key: str) -> Difference:
        """Compares this row with the reference: this minus the reference, over common seeds."""
        both = [
            (found[key], reference.seeds[seed][key])
            for seed, found in self.seeds.items()
            if key in found and key in reference.seeds.get(seed, {})
        ]
        return paired_difference([ours for ours, _ in both], [theirs for _, theirs in both])


def read_rows(results: Results, target: float) -> list[Row]:
    """Returns all rows of a study, in its order, including those without a finished run."""
    asked: dict[tuple[tuple[str, str], tuple[str, ...], str], int] = {}
    for trial in (result.trial for result in results.results):
        names = tuple(name for _, name in trial.variant)
        key = (trial.dataset, trial.partition), names, trial.method
        asked[key] = asked.get(key, 0) + 1

    def read(seeds: Mapping[int, Run]) -> dict[int, Mapping[str, float]]:
        return {seed: figures(run, target) for seed, run in seeds.items()}

    found = {task: results.of(task) for task in results.tasks}
    units = {
        task: common_unit([run for runs in of.values() for run in runs.values()])
        for task, of in found.items()
    }
    return [
        Row(task, variant, method, asked[task, variant, method], read(seeds), units[task])
        for task in results.tasks
        for (variant, method), seeds in found[task].items()
    ]


def differences(rows: Sequence[Row], reference: str, key: str) -> list[Difference | None]:
    """Compares each row with the reference method's on the same task and variant.

    P-values are corrected for all comparisons of the quantity `key` on a task.

    Returns:
      a difference for each row; None for the reference itself, and where it is missing.
    """
    references = {(row.task, row.variant): row for row in rows if row.method == reference}
    compared = {
        i: row.against(other, key)
        for i, row in enumerate(rows)
        if row.method != reference and (other := references.get((row.task, row.variant)))
    }
    for task in {row.task for row in rows}:
        family = [i for i in compared if rows[i].task == task]
        corrected = holm([compared[i].p for i in family])
        for i, p in zip(family, corrected, strict=True):
            compared[i] = compared[i]._replace(holm=p)
    return [compared.get(i) for i in range(len(rows))]

"""Tables as Markdown and LaTeX (booktabs), and all numbers as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from experiments.markup import csv_text, latex_text, markdown_text
from experiments.reporting.tables import Table
from experiments.studying.rows import Row, differences
from experiments.studying.statistics import estimate

CSV_HEADS = (
    "dataset",
    "partition",
    "method",
    "quantity",
    "seeds_asked",
    "seeds_finished",
    "n",
    "mean",
    "margin_95",
    "reference",
    "pairs",
    "difference",
    "difference_margin_95",
    "p_value",
    "p_holm",
    "pairs_above",
    "by_seed",
)


def markdown(table: Table) -> str:
    """Formats a heading and the table as Markdown, without the note."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |\n"

    rule = ["---" if i < table.words else "---:" for i in range(len(table.heads))]
    body = "".join(line(row) for row in table.rows)
    return f"### {markdown_text(table.title)}\n\n{line(table.heads)}{line(rule)}{body}"


def latex(table: Table) -> str:
    r"""Formats the table as a LaTeX `table*`, which needs `\usepackage{booktabs}`."""
    columns = "l" * table.words + "r" * (len(table.heads) - table.words)
    label = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
    lines = [" & ".join(map(latex_text, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{latex_text(table.title)}. {latex_text(table.note)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex_text, table.heads)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def csv_table(rows: Sequence[Row], axes: Sequence[str], reference: str) -> str:
    """Formats a CSV table with one line for each row and quantity.

    Values are raw: bytes, seconds, losses as recorded, accuracies in [0, 1]. The last column has
    those of all seeds, as `0=0.91 1=0.93`, from which all others follow.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_HEADS[:2], *map(csv_text, axes), *CSV_HEADS[2:]])
    quantities = dict.fromkeys(key for row in rows for found in row.seeds.values() for key in found)
    by_key = {key: differences(rows, reference, key) for key in quantities}
    for i, row in enumerate(rows):
        for key in quantities:
            value = estimate(row.values(key))
            numbers: list[object] = [value.n, _plain(value.mean), _plain(value.margin)]
            if (d := by_key[key][i]) is None:
                numbers += [""] * 7
            else:
                compared = map(_plain, (d.mean, d.margin, d.p, d.holm))
                numbers += [csv_text(reference), d.n, *compared, d.above]
            names = [*row.task, *row.variant, row.method, key]
            seeds = (f"{s}={_plain(x[key])}" for s, x in row.seeds.items() if key in x)
            each = " ".join(seeds)
            writer.writerow([*map(csv_text, names), row.asked, len(row.seeds), *numbers, each])
    return out.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"

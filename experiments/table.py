"""Writes the tables of a study: DIR/table.md, DIR/table.csv and DIR/table.tex.

    python -m experiments.table DIR [--target=0.6] [--reference=METHOD]

DIR is the --workdir of a sweep. The sweep need not be finished: missing runs are listed. The same
runs give the same bytes. The tables can be written on any machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags

from experiments.cli import run_cli, user_path
from experiments.markup import markdown_text
from experiments.reporting.quantities import counted
from experiments.studying.formats import csv_table, latex, markdown
from experiments.studying.results import Results, read_results
from experiments.studying.rows import read_rows
from experiments.studying.sheets import TARGET, sheets
from experiments.workdir import write_atomically
from flexmoe_jax.errors import InputError, printable


def write_tables(
    folder: str | os.PathLike[str], target: float = TARGET, reference: str = ""
) -> list[Path]:
    """Writes the tables of a study into its folder.

    Args:
      folder: folder of the study.
      target: client-global accuracy in (0, 1]; the tables show the rounds, bytes and seconds that
        a method needs to reach it.
      reference: the method that all others are compared with; empty for the study's choice.

    Returns:
      the paths of the Markdown, CSV and LaTeX files.

    Raises:
      InputError: the folder holds no study, or the study has no such method.
    """
    folder = Path(folder)
    results = read_results(folder)
    if not 0 < target <= 1:
        raise InputError("--target", target, "give an accuracy above 0 and up to 1")
    reference = results.reference(reference)
    made = sheets(results, target, reference)
    notes = dict.fromkeys(f"- {markdown_text(sheet.note)}\n" for sheet in made)
    lists = [*map(markdown, made), missing(results), noted(results)]
    parts = [
        f"# {markdown_text(results.name)}\n",
        remark(results),
        "".join(notes),
        *filter(None, lists),
    ]
    texts = {
        "table.md": "\n".join(parts),
        "table.csv": csv_table(read_rows(results, target), results.axes, reference),
        "table.tex": "\n".join(map(latex, made)),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def remark(results: Results) -> str:
    """Returns a sentence on how many runs of the study are finished."""
    asked, lacking = len(results.results), len(results.missing)
    if not lacking:
        return f"All {counted(asked, 'run')} are finished.\n"
    return f"{lacking} of {counted(asked, 'run')} are not finished; their names are at the end.\n"


def missing(results: Results) -> str:
    """Lists the runs that are not finished, with their status."""
    said = [f"{result.trial.name}: {result.status}" for result in results.missing]
    lines = [f"- {markdown_text(line)}\n" for line in said]
    return f"### Not finished\n\n{''.join(lines)}" if lines else ""


def noted(results: Results) -> str:
    """Lists data that were left out, and notes to read before trusting the runs' figures."""
    lines = [f"- {markdown_text(note)}\n" for note in results.notes]
    return f"### Notes\n\n{''.join(lines)}" if lines else ""


def main(argv: list[str]) -> None:
    """Writes the tables of the study in `argv[1]` and prints the Markdown one."""
    if len(argv) != 2:
        raise InputError("DIR", " ".join(argv[1:]) or "(none)", "give the --workdir of one sweep")
    try:
        paths = write_tables(user_path("DIR", argv[1]), flags.FLAGS.target, flags.FLAGS.reference)
    except OSError as error:
        remedy = f"{error.filename} cannot be written ({error.strerror}); free it, or some space"
        raise InputError("DIR", argv[1], remedy) from error
    print(paths[0].read_text(encoding="utf-8"))
    print(printable(", ".join(map(str, paths))))


if __name__ == "__main__":
    flags.DEFINE_float("target", TARGET, "Global accuracy to which rounds and bytes are counted.")
    flags.DEFINE_string("reference", "", "Method that all others are compared with.")
    run_cli(main)

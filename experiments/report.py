"""Turns workdirs into one self-contained HTML page.

    python -m experiments.report DIR [DIR ...] [--out FILE]

One workdir gives DIR/report/index.html. Several give a comparison, report.html in their common
parent folder, unless --out says otherwise. A run that is not finished can be reported, too. The
folder of a sweep gives the page of its study, with all seeds of a method in one line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.cli import run_cli, user_path
from experiments.reporting.runs import read_run
from experiments.studying.results import is_study, read_results
from experiments.workdir import write_atomically
from flexmoe_jax.errors import InputError, printable


def write_report(workdirs: Sequence[str | os.PathLike[str]], out: str | Path | None = None) -> Path:
    """Writes the page of one workdir or study, or the comparison of several workdirs.

    Args:
      workdirs: folders that training runs wrote, or the one that a sweep wrote; a folder given
        twice counts once.
      out: the file to write; by default DIR/report/index.html for one workdir and report.html in
        the common parent for several. It is replaced in one step when the page is complete.

    Returns:
      the path of the page.

    Raises:
      InputError: if no workdir is given, a folder is no workdir, or `out` cannot be written.
    """
    folders = list({Path(w).resolve(): Path(w) for w in workdirs}.values())
    if not folders:
        raise InputError("DIR", "(none)", "give the workdir of at least one training run")
    study = read_results(folders[0]) if is_study(folders[0]) and len(folders) == 1 else None
    runs = [] if study else [read_run(folder) for folder in folders]
    page = Path(out) if out is not None else default_out(folders)
    if page.is_dir():
        raise InputError("out", page, f"is a folder; give a file such as {page / 'report.html'}")

    # Matplotlib takes most of a second to import: do it after the folders have been checked.
    from experiments.reporting.page import render
    from experiments.studying.page import render_study

    html = render_study(study) if study else render(runs)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, html)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError("out", page, f"cannot be written ({reason}); choose another") from error
    return page


def default_out(folders: Sequence[Path]) -> Path:
    """Returns the default path of the page: in the run's folder, or beside several runs."""
    if len(folders) == 1:
        return folders[0] / "report" / "index.html"
    return Path(os.path.commonpath([f.resolve() for f in folders])) / "report.html"


def main(argv: list[str]) -> None:
    """Writes the report of the workdirs in `argv[1:]` and prints where it is."""
    out = flags.FLAGS.out
    page = write_report(
        [user_path("DIR", folder) for folder in argv[1:]],
        None if out is None else user_path("--out", out),
    )
    print(f"{printable(page)} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    # Defined here, so that importing `write_report` defines no flag.
    flags.DEFINE_string("out", None, "the HTML file to write")
    run_cli(main)

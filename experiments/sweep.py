"""Runs a study: every method on every data set, partition and seed, each run in its own folder.

    python -m experiments.sweep --study=experiments/studies/digits_smoke.py --workdir=runs/smoke

Finished runs are skipped and unfinished ones continued, so the same command continues where the
last one stopped. Several sweeps on one folder share the work. Ctrl-C stops after the current round;
so does any other end of the sweep, even kill -9. At the end the sweep writes the table
(DIR/table.md) and the page (DIR/report/index.html). A run whose config differs from that of an
edited study has the status `other config`: it continues if only rounds are missing, and is refused
otherwise.

On a cluster, run one job of an array per share (`--index=$SLURM_ARRAY_TASK_ID --count=16`), or let
the sweep submit its own jobs (`--runner=slurm --count=16 --slurm_partition=gpu --gpus=1`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments.cli import refuse_words, run_cli, user_path
from experiments.studying.local import Sweep, dry_run, run
from experiments.studying.slurm import Queue, submit
from flexmoe_jax.errors import InputError


def main(argv: list[str]) -> int:
    """Runs, submits or lists the study, as the flags say; returns the exit code."""
    refuse_words(argv)
    given = flags.FLAGS
    if not given.study:
        remedy = "name a file, as experiments/studies/digits_smoke.py"
        raise InputError("--study", given.study, remedy)
    if not given.workdir:
        raise InputError("--workdir", given.workdir, "name a folder for the study")
    if given.count is not None and given.count < 1:
        raise InputError("--count", given.count, "choose 1 or more")
    sweep = Sweep(
        study=str(user_path("--study", given.study)),
        workdir=str(user_path("--workdir", given.workdir)),
        data_dir=given.data_dir,
        only=given.only,
        index=given.index,
        count=1 if given.runner == "slurm" else given.count or 1,
    )
    try:
        if given.dry_run:
            return dry_run(sweep)
        if given.runner == "slurm":
            queue = Queue(given.slurm_partition, given.minutes, given.gpus, given.cpus)
            folder = Path(sweep.workdir) / "slurm"
            jobs = submit(sweep, queue, str(folder), given.count)
            print(f"jobs {jobs[0].job_id} to {jobs[-1].job_id} are queued; their output: {folder}")
        else:
            return run(sweep)
    except OSError as error:
        print(
            f"{error.filename or sweep.workdir}: {error.strerror or error}; once that is put "
            "right, the same command goes on from here",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("study", None, "File of the study.")
    flags.DEFINE_string("workdir", None, "Folder of the study; runs get folders in it.")
    flags.DEFINE_string("data_dir", "", "Folder of the data, for all runs.")
    flags.DEFINE_string("only", "*", "Pattern that the names of runs must match: '*/flex/seed_*'.")
    flags.DEFINE_integer("index", 0, "Which share of the runs to take, from 0.")
    flags.DEFINE_integer(
        "count", None, "Number of shares; of Slurm jobs, where none means one a run."
    )
    flags.DEFINE_bool("dry_run", False, "Only list what is done, what is left and what it takes.")
    flags.DEFINE_enum("runner", "local", ["local", "slurm"], "Run here, or submit to Slurm.")
    flags.DEFINE_string("slurm_partition", "", "Slurm partition of the jobs.")
    flags.DEFINE_integer("minutes", Queue.minutes, "Time limit of a Slurm job.")
    flags.DEFINE_integer("gpus", Queue.gpus, "GPUs of a Slurm job.")
    flags.DEFINE_integer("cpus", Queue.cpus, "CPU cores of a Slurm job.")
    run_cli(main)

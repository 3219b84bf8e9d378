"""Submits the shares of a sweep to a Slurm queue, through submitit (extra: slurm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.studying.local import Sweep, run
from flexmoe_jax.errors import InputError

if TYPE_CHECKING:
    import submitit


@dataclass(frozen=True)
class Queue:
    """Resources that each job requests from the queue.

    Attributes:
      partition: partition of the cluster; empty for its default.
      minutes: time limit, in minutes.
      gpus: GPUs per job.
      cpus: CPUs per job.
    """

    partition: str = ""
    minutes: int = 24 * 60
    gpus: int = 0
    cpus: int = 4


@dataclass(frozen=True)
class Job:
    """One job: a share of a sweep. A job that is preempted or out of time is queued again."""

    share: Sweep

    def __call__(self) -> int:
        """Runs the share on the node that the queue chose."""
        return run(self.share)

    def checkpoint(self) -> Any:
        """Returns the job to queue again: the same one, which resumes from the files on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    sweep: Sweep, queue: Queue, folder: str, count: int | None = None, cluster: str = "slurm"
) -> Sequence[submitit.Job[int]]:
    """Submits one job array that divides a sweep's runs among its jobs.

    Args:
      sweep: the sweep to run.
      queue: resources that each job requests.
      folder: folder for submitit's own files: scripts and output of the jobs.
      count: number of jobs; None for one job per run.
      cluster: `slurm`, or `local` for processes on this machine.

    Returns:
      the jobs.

    Raises:
      InputError: submitit or Slurm is not installed, or the sweep cannot be run.
    """
    try:
        import submitit
    except ImportError as error:
        remedy = "needs submitit: pip install 'flexmoe_jax[slurm]'"
        raise InputError("--runner", "slurm", remedy) from error
    study, trials = sweep.load()
    count = min(count or len(trials), len(trials))
    jobs = [Job(replace(sweep, index=index, count=count)) for index in range(count)]
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise InputError("--runner", "slurm", f"no Slurm on this machine ({error})") from error
    executor.update_parameters(
        name=f"sweep-{study.name}",
        timeout_min=queue.minutes,
        gpus_per_node=queue.gpus,
        cpus_per_task=queue.cpus,
        **({"slurm_partition": queue.partition} if queue.partition else {}),
    )
    with executor.batch():
        return [executor.submit(job) for job in jobs]

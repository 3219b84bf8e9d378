"""Finds the processes that share one run, from the flags or from the launcher that started them.

A batch queue's environment variables alone prove little: a shell inside an allocation has them too,
and passes them on to every program that it starts. So a process is alone unless the user asks it to
join others, or Slurm started exactly this process as one of several tasks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from absl import flags

from flexmoe_jax.errors import InputError

_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    None,
    ["auto", "off"],
    "auto: one run with the other tasks of the Slurm step, mpirun or TPU pod; off: alone.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for a run over several processes."
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PROCESSES = flags.DEFINE_integer("process_count", None, "How many processes share the run.")
_SECONDS = flags.DEFINE_integer(
    "join_seconds", 15, "How long to wait for the other processes of the run.", lower_bound=1
)

# The range of ports from which JAX, too, chooses its port.
_FIRST_PORT, _PORTS = 61440, 4096


class Program(NamedTuple):
    """A run over several processes, with the number of this process.

    Attributes:
      coordinator: host:port of process 0; empty if JAX finds the others by itself.
      size: number of processes; 0 if JAX finds them.
      number: number of this process, from 0.
      local: number of this process on its machine, which selects its GPU; None for all devices.
      seconds: how long to wait for the others.
    """

    coordinator: str
    size: int
    number: int
    local: int | None = None
    seconds: int = 15

    def address(self) -> tuple[str, int]:
        """Returns host and port of the coordinator.

        Raises:
          InputError: the address is not of the form host:port.
        """
        host, colon, port = self.coordinator.rpartition(":")
        if not (colon and host and port.isdecimal() and 0 < int(port) < 2**16):
            remedy = "give host:port of process 0, as node1:1234"
            raise InputError("--coordinator", self.coordinator, remedy)
        return host.removeprefix("[").removesuffix("]"), int(port)


class Asked(NamedTuple):
    """The flags about other processes; None for a flag that is not given."""

    distributed: str | None = None
    coordinator: str | None = None
    process_id: int | None = None
    process_count: int | None = None
    seconds: int = 15


def asked() -> Asked:
    """Returns the flags of this process."""
    return Asked(
        _DISTRIBUTED.value, _COORDINATOR.value, _PROCESS.value, _PROCESSES.value, _SECONDS.value
    )


def find_program(asked: Asked, environ: Mapping[str, str], pid: int) -> Program | None:
    """Finds the program of several processes that this process belongs to.

    Args:
      asked: the flags about other processes.
      environ: environment variables of this process.
      pid: process id of this process.

    Returns:
      The program; None if this process is alone.

    Raises:
      InputError: the flags do not fit together, or the processes to join cannot be found.
    """
    if (program := _from_flags(asked)) is not None:
        return program if program.size > 1 else None
    if asked.distributed == "off":
        return None
    if _is_task(environ, pid):
        program = _of_slurm(environ)
    elif asked.distributed == "auto":
        program = _of_launcher(environ)
    elif _is_tpu_pod(environ):
        program = Program("", 0, 0)
    if program is None or program.size == 1:
        return None
    return program._replace(seconds=asked.seconds)


def advice(asked: Asked, environ: Mapping[str, str]) -> str:
    """Returns advice for a process that runs alone beside other tasks; empty if there are none."""
    if asked.distributed or asked.coordinator:
        return ""
    for name, kind in (("SLURM_STEP_NUM_TASKS", "Slurm step"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        if (_number(environ, name) or 0) > 1:
            return (
                f"alone, among {environ[name]} tasks of this {kind}: "
                "--distributed=auto makes them one run, --distributed=off says that this is meant"
            )
    return ""


def _from_flags(asked: Asked) -> Program | None:
    given = {
        "--coordinator": asked.coordinator,
        "--process_id": asked.process_id,
        "--process_count": asked.process_count,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        remedy = "give all of --coordinator, --process_id, --process_count"
        raise InputError(missing[0], None, remedy)
    if asked.distributed == "off":
        raise InputError("--distributed", "off", "leave it out, or --coordinator")
    count, number = int(asked.process_count or 0), int(asked.process_id or 0)
    if count < 1:
        raise InputError("--process_count", count, "give 1 or more")
    if not 0 <= number < count:
        raise InputError("--process_id", number, f"give 0 to {count - 1}")
    program = Program(str(asked.coordinator), count, number, None, asked.seconds)
    program.address()
    return program


def _of_launcher(environ: Mapping[str, str]) -> Program:
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _of_open_mpi(environ)
    if any(name.startswith("SLURM_") for name in environ):
        return _of_slurm(environ)
    return Program("", 0, 0)


def _is_task(environ: Mapping[str, str], pid: int) -> bool:
    """Returns whether Slurm started exactly this process as one of several tasks."""
    return (
        _number(environ, "SLURM_TASK_PID") == pid
        and (_number(environ, "SLURM_STEP_NUM_TASKS") or 0) > 1
        and "SLURM_STEP_NODELIST" in environ
    )


def _is_tpu_pod(environ: Mapping[str, str]) -> bool:
    """Returns whether this machine's TPU is part of a pod, which one process cannot use alone."""
    platforms = environ.get("JAX_PLATFORMS", "")
    return (
        "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        and (not platforms or "tpu" in platforms)
        and find_spec("libtpu") is not None
    )


def _of_slurm(environ: Mapping[str, str]) -> Program:
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if not nodes:
        raise _not_found("no step of Slurm around this: start it with srun")
    # Outside a step, `SLURM_NTASKS` belongs to the allocation.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    count, number = _required(environ, size), _required(environ, "SLURM_PROCID")
    job, step = _required(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID") or 0
    # node[001-004,7],other: the first of each bracket, then the first name.
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]
    host = "localhost" if re.fullmatch(r"[^,[]+", nodes) else first
    local = _number(environ, "SLURM_LOCALID")
    return _numbered(Program(f"{host}:{_port(environ, job + 257 * step)}", count, number, local))


def _of_open_mpi(environ: Mapping[str, str]) -> Program:
    size, rank = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    count, number = _required(environ, size), _required(environ, rank)
    # Open MPI 4 gives the address where it was started; later versions give only the job's name.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    job = uri or environ.get("PMIX_NAMESPACE", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^],]+)", uri)
    if _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") == count:
        host = "localhost"
    elif address:
        host = address[1] or f"[{address[2]}]"
    else:
        raise _not_found(
            "mpirun does not say where process 0 is: give --coordinator, "
            f"--process_count=${size} and --process_id=${rank}"
        )
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    port = _port(environ, zlib.crc32(job.encode()))
    return _numbered(Program(f"{host}:{port}", count, number, local))


def _numbered(program: Program) -> Program:
    if not 0 <= program.number < program.size:
        raise _not_found(f"task {program.number} of {program.size} cannot be")
    program.address()
    return program


def _port(environ: Mapping[str, str], job: int) -> str:
    """Returns a port that is the same for all tasks of a job, and most likely differs by job."""
    return environ.get("JAX_COORDINATOR_PORT") or str(_FIRST_PORT + job % _PORTS)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    given = environ.get(name, "")
    # A number with more digits than any counter is not valid, and would only cost `int` time.
    return int(given) if re.fullmatch(r"[0-9]{1,18}", given) else None


def _required(environ: Mapping[str, str], name: str) -> int:
    number = _number(environ, name)
    if number is None:
        raise _not_found(f"{name}={environ.get(name)!r} is no number")
    return number


def _not_found(why: str) -> InputError:
    return InputError("--distributed", "auto", why)

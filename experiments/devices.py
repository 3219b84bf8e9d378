"""Prepares JAX before a launcher first uses it: devices, processes, programs kept on disk."""

from __future__ import annotations

import os

import jax
from absl import flags

from flexmoe_jax.data.cache import default_folder
from flexmoe_jax.errors import InputError

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for a run over several processes."
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PROCESSES = flags.DEFINE_integer("process_count", None, "How many processes share the run.")

# What tells that a scheduler or a TPU pod started several processes, which JAX then finds itself.
_SEVERAL = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def prepare_devices(devices: int) -> None:
    """Joins the run's processes, splits a CPU into devices, and keeps compiled programs.

    A CPU becomes as many devices as it has cores, since one device alone leaves cores idle between
    matrix products; or `devices` of them over all processes, where that is given. Programs are kept
    in the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` names another.

    Args:
      devices: how many the run is to use; 0 for all.

    Raises:
      InputError: flags of a run over several processes that do not fit together.
    """
    processes = _PROCESSES.value or 1
    if processes > 0 and devices % processes:
        raise InputError(
            "execution.devices", devices, f"give a multiple of --process_count={processes}, or 0"
        )
    _join_processes()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices // processes or _cores())
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(default_folder() / "programs"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _join_processes() -> None:
    given = {
        "--coordinator": _COORDINATOR.value,
        "--process_id": _PROCESS.value,
        "--process_count": _PROCESSES.value,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        count, number = int(_PROCESSES.value or 0), int(_PROCESS.value or 0)
        if not 0 <= number < count:
            raise InputError("--process_id", number, f"give 0 to {count - 1}")
        jax.distributed.initialize(_COORDINATOR.value, count, number)
    elif len(missing) < len(given):
        raise InputError(
            missing[0], None, "give all of --coordinator, --process_id, --process_count"
        )
    elif any(int(os.environ.get(name, "1")) > 1 for name in _SEVERAL) or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    ):
        jax.distributed.initialize()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

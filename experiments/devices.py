"""Prepares JAX before its first use: devices, processes, and the cache of compiled programs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments.program import Program
from experiments.rendezvous import bind_address
from flexmoe_jax.data.cache import default_folder
from flexmoe_jax.errors import InputError

# The fields that name what a run reads.
_READ = ("data.name", "edge.tiers", "edge.availability")
_PLATFORM = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
# A peer whose machine fails sends no message; JAX's default limit is 100 s.
_HEARTBEAT_SECONDS = 30
# Processes that have found each other take about the same time to import JAX.
_CONNECT_SECONDS = 60


def prepare_devices(devices: int, program: Program | None = None) -> None:
    """Joins the run's processes, splits a CPU into devices, and caches compiled programs.

    A CPU is split into one device per core, since a single device leaves cores idle between matrix
    products. If `devices` is given, it is the number of devices over all processes. Compiled
    programs are kept in the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` names another.

    Args:
      devices: number of devices that the run uses; 0 for all.
      program: the processes that share the run; None if this process is alone.

    Raises:
      InputError: the processes cannot be joined, or the platform in `JAX_PLATFORMS` does not
        exist.
    """
    if program is not None:
        _join(program)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        processes = (program and program.size) or 1
        jax.config.update("jax_num_cpu_devices", devices // processes or _default_devices())
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(default_folder() / "programs"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    _require_platform()


def _join(program: Program) -> None:
    found = program.coordinator == ""
    try:
        jax.distributed.initialize(
            program.coordinator or None,
            None if found else program.size,
            None if found else program.number,
            # `find_program` has already read the batch queue's variables, with stricter checks.
            cluster_detection_method=None if found else "deactivate",
            initialization_timeout=program.seconds if found else _CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            coordinator_bind_address=None if found else bind_address(program),
        )
    except Exception as error:  # JAX's detection can raise any exception
        said = " ".join(str(error).split())
        if found:
            remedy = f"no Slurm step, mpirun or TPU pod is known to have started this ({said})"
            raise InputError("--distributed", "auto", remedy) from error
        remedy = f"the processes cannot be joined: {said}"
        raise InputError("--coordinator", program.coordinator, remedy) from error


def require_same_inputs(config: ConfigDict, inputs: Mapping[str, str]) -> None:
    """Rejects a run whose processes read different data or different files of the user.

    Args:
      config: the config of the run.
      inputs: hashes of what this process reads, as in inputs.json.

    Raises:
      InputError: naming a field and a process for which its content differs from that for process
        0; all processes raise the same error.
    """
    if jax.process_count() == 1:
        return
    hashes: dict[str, dict[str, str]] = {field: {} for field in _READ}
    for name, value in inputs.items():
        hashes["data.name" if name.startswith("data.") else name][name] = value
    ours = np.stack([_digest(of_field) for of_field in hashes.values()])
    digests = multihost_utils.process_allgather(ours)  # (processes, fields, 8)
    differs = (digests != digests[0]).any(axis=2)
    for field, processes in zip(_READ, differs.T, strict=True):
        if processes.any():
            group, name = field.split(".")
            remedy = f"is not the same for process {processes.argmax()} as for process 0"
            raise InputError(field, config[group][name], remedy)


def _digest(hashes: Mapping[str, str]) -> np.ndarray:
    text = json.dumps(hashes, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(text).digest(), np.uint32)


def _require_platform() -> None:
    """Checks that a device exists, before minutes are spent on reading data."""
    try:
        jax.devices()
    except RuntimeError as error:
        name = next((n for n in _PLATFORM if os.environ.get(n)), _PLATFORM[0])
        remedy = f"JAX finds no such device here ({' '.join(str(error).split())})"
        raise InputError(name, os.environ.get(name), remedy) from error


def _default_devices() -> int:
    """Returns one device per core; one in all if jit is off, since sharding needs compilation."""
    return 1 if jax.config.values["jax_disable_jit"] else _cores()


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

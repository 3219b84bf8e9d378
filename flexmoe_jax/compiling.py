"""XLA compiler options and array placement, so that equal functions give bit-identical results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def compiler_options(level: int) -> dict[str, Any]:
    """Returns the compiler options for an optimisation level.

    On a CPU, XLA's default level 3 compiles longer than level 2, and its code is no faster; for a
    program that runs once, a lower level is enough. The options are empty on other backends, and if
    JAX is configured to disable most optimisations.

    Args:
      level: 0 to 3.
    """
    if jax.config.values["jax_disable_most_optimizations"] or jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": level}


# Levels for programs that train and evaluate, and for programs that run once.
USUAL, ONCE = 2, 1


def everywhere() -> NamedSharding:
    """Returns the sharding of the simulation's arrays: this process's first device alone."""
    mesh = Mesh(np.asarray(jax.local_devices()[:1]), ("clients",))
    return NamedSharding(mesh, PartitionSpec())


def placed(tree: Any) -> Any:
    """Copies arrays to the simulation's device and sharding, so that XLA compiles the same program.

    The arrays get their own memory. Otherwise a CPU would use the memory of a NumPy array, and the
    memory alignment of this array would decide in which order sums are taken.
    """
    return jax.device_put(jax.tree.map(lambda x: jnp.array(x, copy=True), tree), everywhere())

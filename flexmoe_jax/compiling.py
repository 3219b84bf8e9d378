"""How XLA is told to compile, so that the same function gives the same bits wherever it runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def compiler_options(level: int) -> dict[str, Any]:
    """Options of a program that is compiled at an optimisation level.

    On a CPU, XLA's own level 3 compiles longer than 2 for code no quicker; what runs once is done
    with even less. None are given on other backends, or where JAX is told to optimise little.

    Args:
      level: 0 to 3.
    """
    if jax.config.values["jax_disable_most_optimizations"] or jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": level}


# Of what trains and evaluates, and of what runs once.
USUAL, ONCE = 2, 1


def everywhere() -> NamedSharding:
    """On this process's first device alone, as the simulation places arrays there."""
    mesh = Mesh(np.asarray(jax.local_devices()[:1]), ("clients",))
    return NamedSharding(mesh, PartitionSpec())


def placed(tree: Any) -> Any:
    """Arrays on the device, as the simulation has them: then XLA makes the same program of both.

    In memory of its own: a CPU would take an array of NumPy's where it lies, and how it lies there
    decides in which order sums are taken.
    """
    return jax.device_put(jax.tree.map(lambda x: jnp.array(x, copy=True), tree), everywhere())

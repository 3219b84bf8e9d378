"""Experts split over devices: clients' experts are fetched, and updates are brought to them.

The `n` devices along a mesh's axis `EXPERTS` are a group. A group has one copy of the server's
experts, in equal shares. Its devices visit their blocks of clients in lockstep, and exchange
experts before and after training. A device receives the experts that its own clients hold, and the
updates of all clients of the group, of which it adds those of its own experts.

In an exchange, all leaves travel as one array (one for each type of numbers): XLA's CPU devices may
enter exchanges that do not depend on each other in different orders, and then wait for ever.

Axis legend: `E` experts, `K` expert slots, `p` clients of a block, `n` devices of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.server import Aggregator, Arrived, Sums
from flexmoe_jax.server.aggregate import count_of
from flexmoe_jax.server.server import Fetch, take
from flexmoe_jax.simulation.blocks import BY_EXPERT, CLIENTS, EXPERTS, WHOLE
from flexmoe_jax.types import Array, PyTree, Server, State

OF_SERVER = Server(*cast(Any, (WHOLE, WHOLE, WHOLE, BY_EXPERT, (WHOLE, BY_EXPERT), WHOLE)))
"""The partitions of the server's state: experts and their optimiser state are split."""
OF_STATE = State(OF_SERVER, cast(Any, WHOLE))
"""The partitions of a state whose clients each device receives in full."""


def expert_devices(mesh: Mesh) -> int:
    """Returns n, the number of devices that share one copy of the experts."""
    return int(mesh.shape[EXPERTS])


def check_split(federation: Federation, mesh: Mesh) -> None:
    """Refuses experts that cannot be split over a mesh.

    Raises:
      InputError: the devices cannot have equally many experts each, or the aggregator keeps all
        updates.
    """
    devices, experts = expert_devices(mesh), federation.layout.experts
    if experts % devices:
        remedy = f"give a divisor of the number of experts, {experts}"
        raise InputError("execution.expert_devices", devices, remedy)
    if devices > 1 and not federation.aggregation.by_part:
        remedy = "the aggregator needs all updates on each device: choose the mean, or give 1"
        raise InputError("execution.expert_devices", devices, remedy)


def fetch_own(mesh: Mesh) -> Fetch:
    """Makes the function with which every device fetches the experts of a client of its own."""

    def fetch(experts: PyTree, numbers: dict[str, Array]) -> PyTree:
        ask = partial(lax.all_gather, axis_name=EXPERTS, tiled=True)
        asked = _at_once(ask, jax.tree.map(lambda x: x[None], numbers))  # (n, K)
        answer = partial(lax.psum_scatter, axis_name=EXPERTS, tiled=True)
        return jax.tree.map(lambda x: x[0], _at_once(answer, _rows_here(experts, asked)))

    return fetch if expert_devices(mesh) > 1 else take


def fetch_alike(mesh: Mesh) -> Fetch:
    """Makes the function with which all devices fetch the experts of the same client."""

    def fetch(experts: PyTree, numbers: dict[str, Array]) -> PyTree:
        return _at_once(partial(lax.psum, axis_name=EXPERTS), _rows_here(experts, numbers))

    return fetch if expert_devices(mesh) > 1 else take


def split_sums(aggregator: Aggregator, mesh: Mesh) -> tuple[Aggregator, PyTree]:
    """Returns an aggregator whose totals are split as the experts are, and their partitions."""
    if expert_devices(mesh) == 1:
        return aggregator, WHOLE

    def add(total: Sums, block: Arrived) -> Sums:
        together = partial(lax.all_gather, axis_name=EXPERTS, tiled=True)
        experts, slots, usage = _at_once(together, (block.experts, block.slots, block.usage))
        here = {
            layer: _place_here(slots[layer], count_of(stack))
            for layer, stack in total.experts.items()
        }
        return aggregator.add(total, block._replace(experts=experts, slots=here, usage=usage))

    def merge(total: Sums, axes: tuple[str, ...]) -> Sums:
        # All devices of a group have added the same updates of experts.
        shared = aggregator.merge((total.shared, total.shared_weight), axes)
        return Sums(*shared, *aggregator.merge((total.experts, total.expert_weight), CLIENTS))

    split = Sums(*cast(Any, (WHOLE, WHOLE, BY_EXPERT, BY_EXPERT)))
    return aggregator._replace(add=add, merge=merge), split


def _place_here(numbers: Array, count: int) -> Array:
    """Numbers experts (...,) from this device's first; `count`, for none, if others have them."""
    here = numbers - count * lax.axis_index(EXPERTS)
    return jnp.where((here >= 0) & (here < count), here, count)


def _rows_here(experts: PyTree, numbers: dict[str, Array]) -> PyTree:
    """Takes experts (..., K) that this device has, leaves (..., K, ...); 0 where it has not."""

    def of_layer(stack: PyTree, asked: Array) -> PyTree:
        count = count_of(stack)
        last = count * lax.axis_size(EXPERTS) - 1
        place = _place_here(jnp.minimum(asked, last), count)
        return jax.tree.map(lambda x: jnp.take(x, place, axis=0, mode="fill", fill_value=0), stack)

    return {layer: of_layer(stack, numbers[layer]) for layer, stack in experts.items()}


def _at_once(exchange: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """Sends all leaves (n, ...) of a tree through an exchange along their first axis, as one array.

    Args:
      exchange: (n, numbers) -> (m, numbers).
      tree: leaves (n, ...).

    Returns:
      The tree with leaves (m, ...).
    """
    leaves, structure = jax.tree.flatten(tree)
    for kind in {leaf.dtype: None for leaf in leaves}:
        ours = [i for i, leaf in enumerate(leaves) if leaf.dtype == kind]
        flat = [leaves[i].reshape(len(leaves[i]), -1) for i in ours]
        ends = np.cumsum([x.shape[1] for x in flat])[:-1]
        arrived = jnp.split(exchange(jnp.concatenate(flat, axis=1)), ends, axis=1)
        for i, x in zip(ours, arrived, strict=True):
            leaves[i] = x.reshape(len(x), *leaves[i].shape[1:])
    return jax.tree.unflatten(structure, leaves)

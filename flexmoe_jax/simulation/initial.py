"""The state before the first round: what it holds, and on which devices each part lies.

Axis legend: `C` clients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from flexmoe_jax import server
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import ALONG_FIRST, WHOLE, put_rows, take_rows
from flexmoe_jax.simulation.exchange import OF_SERVER, expert_devices
from flexmoe_jax.types import Array, Key, Own, Params, PyTree, State

# Number of clients whose own parameters are drawn side by side.
_DRAWN = 256


def init(federation: Federation, key: Key) -> State:
    """Returns the state before the first round; each of C clients has its own gates and parts.

    Raises:
      InputError: `key` is not a random key of JAX.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError("key", key.dtype, "give a key, as jax.random.key(0)")
    params, owns = init_owns(federation, key, jnp.arange(federation.clients, dtype=jnp.int32))
    begun = server.init(federation.desk, key, params.shared, params.experts, federation.clients)
    return State(begun, owns)


def init_owns(federation: Federation, key: Key, numbers: Array) -> tuple[Params, Own]:
    """Draws the model, and what the clients with the given ids (C,) own at the start."""
    model_key, gate_key = jax.random.split(key)
    params = federation.draw(model_key)

    def own(number: Array) -> Own:
        return federation.own(params, jax.random.fold_in(gate_key, number))

    return params, _in_blocks(own, numbers)


def _in_blocks(function: Callable[[Array], PyTree], numbers: Array) -> PyTree:
    """Maps a function of one number over many (C,), block by block.

    If all clients were drawn at once, the random bits would take several times the memory of the
    parameters.
    """
    size = min(len(numbers), _DRAWN)
    table = jax.tree.map(
        lambda x: jnp.zeros((len(numbers), *x.shape), x.dtype), jax.eval_shape(function, numbers[0])
    )

    def fill(block: Array, table: PyTree) -> PyTree:
        # The last block overlaps the one before it, so that all blocks have the same size.
        rows = jnp.minimum(block * size, len(numbers) - size) + jnp.arange(size, dtype=jnp.int32)
        return put_rows(table, rows, jax.vmap(function)(take_rows(numbers, rows)))

    return lax.fori_loop(0, -(-len(numbers) // size), fill, table)


def places(clients: int, mesh: Mesh) -> State:
    """Places a state on the devices: what clients own is split over all of them.

    If the devices cannot have equally many clients each, or belong to several processes, it is
    replicated. Experts and their optimiser state are split along the mesh's axis `EXPERTS`, and the
    rest of the server's state is replicated.
    """
    even = mesh.size > 1 and clients % mesh.size == 0 and jax.process_count() == 1
    own: Any = ALONG_FIRST if even else WHOLE
    # A partition over one device would be no partition, but another type to `jit`.
    of_server: Any = OF_SERVER if expert_devices(mesh) > 1 else WHOLE
    split = State(of_server, Own(own, own, cast(Any, WHOLE), own))
    placed: State = jax.tree.map(partial(NamedSharding, mesh), split)
    return placed

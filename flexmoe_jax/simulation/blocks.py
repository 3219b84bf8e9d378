"""Many clients as one program: devices share them, and each takes them block by block.

Nothing here is federated: a function of one client is mapped over rows, and what the clients send
is added up on the way. How many devices there are and how many clients run side by side decides
speed alone. On a CPU one client at a time keeps its activations in cache; on an accelerator the
mapped client axis is what fills the chip.

Axis legend: `P` rows, one a client, `p` rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, PyTree

AXIS = "clients"
"""The mesh axis over which devices share a cohort."""
_ALONG_FIRST = PartitionSpec(AXIS)


def client_mesh(devices: int = 0) -> Mesh:
    """A mesh of this many devices, over all processes; 0 for all there are.

    Raises:
      InputError: there are fewer.
    """
    there = jax.device_count()
    if not 0 <= devices <= there:
        raise InputError("execution.devices", devices, f"give 0 (all) to {there}")
    chosen = jax.devices()[: devices or there]
    return jax.make_mesh((len(chosen),), (AXIS,), (AxisType.Auto,), devices=chosen)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a whole copy of every array on each device of the mesh.

    Of several processes each hands over its own copy, which must be equal to the others'. It is not
    checked: that would send all copies around, and refuse NaN, which differs from itself.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(leaf: np.ndarray) -> Array:
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda part: leaf[part])

    return jax.tree.map(lambda leaf: put(np.asarray(leaf)), jax.device_get(tree))


def resolve_block_size(block_size: int, cohort: int, devices: int = 1) -> int:
    """Turns 0 (automatic) into a number, and cuts it to a device's share of the cohort.

    Automatic is 1 on CPU and the device's whole share, up to 64 clients, elsewhere.
    """
    automatic = 1 if jax.default_backend() == "cpu" else 64
    return min(block_size or automatic, -(-cohort // devices))


def over_devices(
    function: Callable[[PyTree, PyTree], tuple[Any, PyTree]],
    split: PyTree,
    whole: PyTree,
    mesh: Mesh,
    *,
    merge: Callable[[Any, str], Any] = lax.psum,
    spec: PartitionSpec = _ALONG_FIRST,
) -> tuple[Any, PyTree]:
    """Runs a function of (a share of `split`, all of `whole`) on every device of a mesh.

    Args:
      function: its first output is merged over the devices, its second is joined along the first
        axis.
      split: arrays that the devices share out, along the axis that `spec` gives to `AXIS`.
      whole: arrays that each device gets as they are.
      mesh: from `client_mesh`. One device alone runs the plain function, which JAX can then also
        run without compiling it.
      merge: (a device's first output, name of the axis) -> that of all devices.
      spec: of `split`.
    """
    if mesh.size == 1:
        return function(split, whole)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=(PartitionSpec(), _ALONG_FIRST),
        check_vma=False,
    )
    def on_one(split: PyTree, whole: PyTree) -> tuple[Any, PyTree]:
        total, joined = function(split, whole)
        return merge(total, AXIS), joined

    outputs: tuple[Any, PyTree] = on_one(split, whole)
    return outputs


def over_blocks(
    visit: Callable[[PyTree], tuple[PyTree, PyTree]],
    add: Callable[[Any, PyTree], Any],
    zero: Any,
    rows: PyTree,
    block_size: int,
) -> tuple[Any, PyTree]:
    """Visits every row and adds up what the rows send, block by block.

    Args:
      visit: row -> (what it sends, what is kept of it).
      add: (total so far, what a block sends, leaves (p, ...)) -> total.
      zero: total of nobody.
      rows: leaves (P, ...), P a multiple of the block size.
      block_size: p, rows side by side.

    Returns:
      The total, and what is kept, leaves (P, ...).
    """

    def run(total: Any, block: PyTree) -> tuple[Any, PyTree]:
        if block_size > 1:
            sent, kept = jax.vmap(visit)(block)
        else:
            # A row alone is taken out of its block: with the axis of one, XLA copies all
            # parameters at every step of its training.
            sent, kept = jax.tree.map(lambda x: x[None], visit(jax.tree.map(lambda x: x[0], block)))
        return add(total, sent), kept

    blocks = jax.tree.map(lambda x: x.reshape(len(x) // block_size, block_size, *x.shape[1:]), rows)
    total, kept = lax.scan(run, zero, blocks)
    return total, jax.tree.map(lambda x: x.reshape(len(x) * block_size, *x.shape[2:]), kept)


def take_rows(table: PyTree, rows: Array) -> PyTree:
    """Rows (..., ) of leaves (C, ...); a number out of range takes any row."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), table)


def put_rows(table: PyTree, rows: Array, new: PyTree) -> PyTree:
    """The table with new rows (P, ...); a number out of range puts nothing."""
    return jax.tree.map(lambda old, row: old.at[rows].set(row, mode="drop"), table, new)
